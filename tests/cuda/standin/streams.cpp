// Streams: their threads, the rules of the legacy stream, and waiting for them.
#include <pthread.h>

#include <thread>

#include "graph.hpp"
#include "stream.hpp"

namespace standin {

void Signal::complete() {
  const std::lock_guard<std::mutex> lock(mutex_);
  time_ = std::chrono::steady_clock::now();
  done_.store(true, std::memory_order_release);
  changed_.notify_all();
}

void Signal::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return done(); });
}

Jitter::Jitter(std::uint64_t salt)
    : random_(static_cast<std::uint64_t>(setting("STANDIN_SEED", 0)) * 1000003 + salt) {}

void Jitter::sleep() {
  const std::int64_t longest_us = setting("STANDIN_JITTER_US", 0);
  // Half of the work starts at once: that, beside long delays, is what reorders streams most.
  if (longest_us <= 0 || random_() % 2 == 0) return;
  std::this_thread::sleep_for(
      std::chrono::microseconds(random_() % static_cast<std::uint64_t>(longest_us)));
}

Stream::Stream(std::shared_ptr<Context> context, unsigned int flags, int priority, bool legacy)
    : context_(std::move(context)),
      flags_(flags),
      priority_(priority),
      legacy_(legacy),
      jitter_(new_handle()) {}

SignalPtr Stream::tail() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return tail_;
}

bool Stream::idle() const {
  const SignalPtr last = tail();
  return last == nullptr || last->done();
}

SignalPtr Stream::push(Action action, bool always) {
  const std::lock_guard<std::mutex> lock(mutex_);
  tail_ = std::make_shared<Signal>();
  queue_.push_back({std::move(action), always, tail_});
  if (!started_) {
    started_ = true;
    std::thread([self = shared_from_this()] { self->run(); }).detach();
  }
  changed_.notify_one();
  return tail_;
}

SignalPtr Stream::enqueue(Action action, bool always) {
  const auto wait_for = [this](const Stream& other) {
    if (other.idle()) return;
    push(
        [signal = other.tail()] {
          signal->wait();
          return CUDA_SUCCESS;
        },
        /*always=*/false);
  };
  // The legacy stream waits for all blocking streams of its context, and they for it.
  if (legacy_) {
    for (const auto& stream : live_streams(*context_)) {
      if (stream->blocking()) wait_for(*stream);
    }
  } else if (blocking()) {
    wait_for(*context_->legacy_stream);
  }
  return push(std::move(action), always);
}

void Stream::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  changed_.notify_one();
}

void Stream::run() {
  pthread_setname_np(pthread_self(), "standin-stream");
  while (true) {
    Item item;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return closed_ || !queue_.empty(); });
      if (queue_.empty()) return;
      item = std::move(queue_.front());
      queue_.pop_front();
    }
    jitter_.sleep();
    if (item.always || context_->error == CUDA_SUCCESS) {
      if (const CUresult result = item.action(); result != CUDA_SUCCESS) context_->fail(result);
    }
    // What the work held must be gone before anyone learns that it is done.
    item.action = nullptr;
    item.signal->complete();
  }
}

Registry<CUstream, Stream>& streams() {
  static auto& instance = *new Registry<CUstream, Stream>;
  return instance;
}

std::vector<std::shared_ptr<Stream>> live_streams(Context& context) {
  std::vector<std::shared_ptr<Stream>> live;
  std::vector<std::weak_ptr<Stream>> kept;
  for (const auto& weak : context.streams) {
    if (auto stream = weak.lock()) {
      kept.push_back(weak);
      live.push_back(std::move(stream));
    }
  }
  context.streams = std::move(kept);
  return live;
}

std::shared_ptr<Stream> make_legacy_stream(const std::shared_ptr<Context>& context) {
  auto stream = std::make_shared<Stream>(context, CU_STREAM_DEFAULT, 0, /*legacy=*/true);
  const std::lock_guard<std::mutex> lock(api_mutex());
  context->streams.push_back(stream);
  return stream;
}

std::size_t drop_streams_and_events(const Context& context) {
  const auto of_context = [&context](const auto& object) {
    return object.context.get() == &context;
  };
  std::size_t count = streams().remove_if([&context](Stream& stream) {
    if (stream.context().get() != &context) return false;
    stream.close();
    return true;
  });
  count += events().remove_if(of_context);
  return count;
}

CUresult find_stream(CUstream handle, std::shared_ptr<Stream>* stream) {
  if (handle == nullptr || handle == CU_STREAM_LEGACY) {
    std::shared_ptr<Context> context;
    STANDIN_TRY(current_context(&context));
    *stream = context->legacy_stream;
    return CUDA_SUCCESS;
  }
  if (handle == CU_STREAM_PER_THREAD) return CUDA_ERROR_NOT_SUPPORTED;
  *stream = streams().find(handle);
  if (*stream == nullptr) {
    count_misuse("dead stream");
    return CUDA_ERROR_INVALID_HANDLE;
  }
  return (*stream)->context()->error;
}

Action host_action(CUhostFn function, void* argument) {
  return [function, argument] {
    in_host_function() = true;
    function(argument);
    in_host_function() = false;
    return CUDA_SUCCESS;
  };
}

CUresult submit(CUstream handle, CUgraphNodeType type, Action action,
                std::shared_ptr<Event> event) {
  std::shared_ptr<Context> context;
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(current_context(&context));
  STANDIN_TRY(find_stream(handle, &stream));
  const std::lock_guard<std::mutex> lock(api_mutex());
  STANDIN_TRY(check_legacy_use(*stream));
  if (stream->capture != nullptr) {
    return capture_node(*stream, type, std::move(action), std::move(event));
  }
  stream->enqueue(std::move(action));
  return CUDA_SUCCESS;
}

namespace {

// Waits for, or asks about, everything in `stream`; a capturing stream has nothing to wait for.
CUresult check_host_may_look(Stream& stream) {
  STANDIN_TRY(check_capture_allows());
  const std::lock_guard<std::mutex> lock(api_mutex());
  STANDIN_TRY(check_legacy_use(stream));
  if (stream.capture == nullptr) return CUDA_SUCCESS;
  stream.capture->invalidated = true;
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult wait_for(const std::vector<SignalPtr>& tails, const Context& context) {
  for (const SignalPtr& tail : tails) {
    if (tail != nullptr) tail->wait();
  }
  return context.error;
}

CUresult wait_for_stream(Stream& stream) {
  std::vector<SignalPtr> tails{stream.tail()};
  if (stream.legacy()) {
    const std::lock_guard<std::mutex> lock(api_mutex());
    for (const auto& other : live_streams(*stream.context())) {
      if (other->blocking()) tails.push_back(other->tail());
    }
  }
  return wait_for(tails, *stream.context());
}

CUresult create_stream(CUstream* handle, unsigned int flags, int priority) {
  std::shared_ptr<Context> context;
  STANDIN_TRY(current_context(&context));
  if (handle == nullptr || (flags & ~static_cast<unsigned int>(CU_STREAM_NON_BLOCKING)) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto stream = std::make_shared<Stream>(context, flags, priority, /*legacy=*/false);
  const std::lock_guard<std::mutex> lock(api_mutex());
  context->streams.push_back(stream);
  *handle = streams().add(stream);
  stream->handle = *handle;
  return CUDA_SUCCESS;
}

}  // namespace

CUresult synchronize_legacy() {
  std::shared_ptr<Context> context;
  STANDIN_TRY(current_context(&context));
  return wait_for_stream(*context->legacy_stream);
}

CUresult synchronize_context() {
  std::shared_ptr<Context> context;
  STANDIN_TRY(current_context(&context));
  STANDIN_TRY(check_capture_allows());
  std::vector<SignalPtr> tails;
  {
    const std::lock_guard<std::mutex> lock(api_mutex());
    for (const auto& stream : live_streams(*context)) {
      if (stream->capture != nullptr) {
        stream->capture->invalidated = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
      }
      tails.push_back(stream->tail());
    }
  }
  return wait_for(tails, *context);
}

}  // namespace standin

using standin::find_stream;
using standin::Stream;

CUresult cuStreamCreate(CUstream* phStream, unsigned int Flags) {
  STANDIN_ENTER();
  return standin::create_stream(phStream, Flags, 0);
}

CUresult cuStreamCreateWithPriority(CUstream* phStream, unsigned int flags, int priority) {
  STANDIN_ENTER();
  return standin::create_stream(phStream, flags, priority);
}

CUresult cuStreamDestroy(CUstream hStream) {
  STANDIN_ENTER();
  const auto stream = standin::streams().remove(hStream);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const std::lock_guard<std::mutex> lock(standin::api_mutex());
  if (stream->capture != nullptr) standin::abandon_capture(*stream);
  stream->close();
  return CUDA_SUCCESS;
}

CUresult cuStreamQuery(CUstream hStream) {
  STANDIN_ENTER();
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(find_stream(hStream, &stream));
  STANDIN_TRY(standin::check_host_may_look(*stream));
  return stream->idle() ? stream->context()->error.load() : CUDA_ERROR_NOT_READY;
}

CUresult cuStreamSynchronize(CUstream hStream) {
  STANDIN_ENTER();
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(find_stream(hStream, &stream));
  STANDIN_TRY(standin::check_host_may_look(*stream));
  return standin::wait_for_stream(*stream);
}

#undef cuCtxSynchronize
CUresult cuCtxSynchronize() {
  STANDIN_ENTER();
  return standin::synchronize_context();
}

CUresult cuStreamWaitEvent(CUstream hStream, CUevent hEvent, unsigned int Flags) {
  STANDIN_ENTER();
  std::shared_ptr<Stream> stream;
  std::shared_ptr<standin::Event> event;
  STANDIN_TRY(find_stream(hStream, &stream));
  STANDIN_TRY(standin::find_event(hEvent, &event));
  if ((Flags & ~static_cast<unsigned int>(CU_EVENT_WAIT_EXTERNAL)) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const std::lock_guard<std::mutex> lock(standin::api_mutex());
  STANDIN_TRY(standin::check_legacy_use(*stream));
  if (Flags == CU_EVENT_WAIT_EXTERNAL) {
    if (stream->capture == nullptr) return CUDA_ERROR_INVALID_VALUE;
    return standin::capture_node(*stream, CU_GRAPH_NODE_TYPE_WAIT_EVENT, nullptr, event);
  }
  if (event->captured) return standin::join_capture(*stream, *event);
  if (stream->capture != nullptr) {
    stream->capture->invalidated = true;
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  if (event->latest != nullptr) {
    stream->enqueue([signal = event->latest] {
      signal->wait();
      return CUDA_SUCCESS;
    });
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream hStream, CUhostFn fn, void* userData) {
  STANDIN_ENTER();
  if (fn == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return standin::submit(hStream, CU_GRAPH_NODE_TYPE_HOST, standin::host_action(fn, userData));
}

#undef cuStreamGetCtx
CUresult cuStreamGetCtx(CUstream hStream, CUcontext* pctx) {
  STANDIN_ENTER();
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(find_stream(hStream, &stream));
  *pctx = stream->context()->handle;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetFlags(CUstream hStream, unsigned int* flags) {
  STANDIN_ENTER();
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(find_stream(hStream, &stream));
  *flags = stream->flags();
  return CUDA_SUCCESS;
}

CUresult cuStreamGetPriority(CUstream hStream, int* priority) {
  STANDIN_ENTER();
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(find_stream(hStream, &stream));
  *priority = stream->priority();
  return CUDA_SUCCESS;
}

CUresult cuStreamGetId(CUstream hStream, unsigned long long* streamId) {
  STANDIN_ENTER();
  std::shared_ptr<Stream> stream;
  STANDIN_TRY(find_stream(hStream, &stream));
  *streamId = standin::handle_value(stream->handle);
  return CUDA_SUCCESS;
}
