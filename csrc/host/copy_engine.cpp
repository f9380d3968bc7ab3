#include "host/copy_engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "common/error.hpp"
#include "common/thread.hpp"

namespace dwdp::host {
namespace {

// How far one lane is with its part of a fetch. Under the mutex of the lane.
struct LanePart {
  std::int64_t start_ns = 0;
  std::size_t num_slices_left = 0;
  std::size_t num_bytes = 0;
};

// A fetch on its way. Recycled, so that submitting allocates nothing once the pool is warm.
struct Submission {
  explicit Submission(std::size_t num_lanes) : parts(num_lanes) {}

  std::shared_ptr<const Fetch> fetch;
  std::shared_ptr<Event> after;
  std::uint64_t after_generation = 0;
  std::shared_ptr<Event> done;
  std::uint64_t done_generation = 0;
  std::atomic<std::size_t> num_slices_left{0};
  std::vector<LanePart> parts;  // per lane
};

// First-in first-out queue of fixed capacity. A lane's queue never holds more than there are
// submissions, so it is grown together with their pool and pushing cannot fail.
class Queue {
 public:
  void reserve(std::size_t capacity) {
    std::vector<Submission*> grown(capacity);
    for (std::size_t i = 0; i < size_; ++i) grown[i] = items_[(head_ + i) % items_.size()];
    items_.swap(grown);
    head_ = 0;
  }
  bool empty() const noexcept { return size_ == 0; }
  Submission* front() const noexcept { return items_[head_]; }
  void push(Submission* item) noexcept { items_[(head_ + size_++) % items_.size()] = item; }
  void pop() noexcept {
    head_ = (head_ + 1) % items_.size();
    --size_;
  }

 private:
  std::vector<Submission*> items_;
  std::size_t head_ = 0;
  std::size_t size_ = 0;
};

struct Lane {
  std::mutex mutex;
  std::condition_variable work;
  Queue queue;
  std::size_t next_slice = 0;  // of the queue's front
  bool closing = false;
  SpanRing spans;
  std::int64_t last_end_ns = 0;  // of the span recorded last
};

}  // namespace

Fetch::Fetch(std::vector<std::vector<Copy>> lanes,
             std::vector<std::shared_ptr<const void>> keep_mapped, std::size_t layer)
    : slices_(std::move(lanes), "lane"), keep_mapped_(std::move(keep_mapped)), layer_(layer) {}

class CopyEngine::State {
 public:
  State(std::size_t num_lanes, std::size_t lane_depth) : lanes_(num_lanes) {
    grow_pool(kInitialPool);
    threads_.reserve(num_lanes * lane_depth);
    try {
      for (std::size_t lane = 0; lane < num_lanes; ++lane) {
        for (std::size_t i = 0; i < lane_depth; ++i) {
          threads_.push_back(start_thread(concat("dwdp-lane-", lane), [this, lane] { run(lane); }));
        }
      }
    } catch (...) {
      close();
      throw;
    }
  }

  void submit(std::shared_ptr<const Fetch> fetch, std::shared_ptr<Event> after,
              std::shared_ptr<Event> done);
  std::size_t fetch_activated(const Demand& demand, const void* indices, std::size_t count,
                              std::size_t index_bytes);
  std::vector<std::vector<Span>> drain_spans();
  void close() noexcept;

  bool forked() const noexcept { return getpid() != pid_; }

 private:
  static constexpr std::size_t kInitialPool = 64;

  void run(std::size_t lane_index);
  Copy take_slice(Lane& lane, std::size_t lane_index);
  void end_slice(Lane& lane, std::size_t lane_index, Submission& submission);
  void push(Lane& lane, Submission* submission);
  void finish(Submission& submission);
  Submission* take_submission();
  void grow_pool(std::size_t size);

  const pid_t pid_ = getpid();
  std::vector<Lane> lanes_;
  std::mutex join_mutex_;
  std::vector<std::thread> threads_;

  // Held while a fetch is queued on its lanes, so that all lanes see the same order.
  std::mutex submit_mutex_;
  bool closing_ = false;

  std::mutex pool_mutex_;
  std::vector<std::unique_ptr<Submission>> submissions_;
  std::vector<Submission*> free_;

  std::mutex demand_mutex_;  // of threads that fetch on demand among themselves
  SpanRing demand_spans_;
};

void CopyEngine::State::grow_pool(std::size_t size) {
  submissions_.reserve(size);
  free_.reserve(size);
  for (Lane& lane : lanes_) {
    const std::lock_guard<std::mutex> lock(lane.mutex);
    lane.queue.reserve(size);
  }
  while (submissions_.size() < size) {
    submissions_.push_back(std::make_unique<Submission>(lanes_.size()));
    free_.push_back(submissions_.back().get());
  }
}

Submission* CopyEngine::State::take_submission() {
  const std::lock_guard<std::mutex> lock(pool_mutex_);
  if (free_.empty()) grow_pool(2 * submissions_.size());
  Submission* const submission = free_.back();
  free_.pop_back();
  return submission;
}

void CopyEngine::State::submit(std::shared_ptr<const Fetch> fetch, std::shared_ptr<Event> after,
                               std::shared_ptr<Event> done) {
  const std::lock_guard<std::mutex> lock(submit_mutex_);
  DWDP_CHECK(!closing_, "a fetch of ", fetch->num_bytes(),
             " bytes was submitted to a closed copy engine");
  Submission* const submission = take_submission();
  submission->fetch = fetch;
  submission->after_generation = after ? after->issued() : 0;
  submission->after = std::move(after);
  submission->done_generation = done->issue();
  submission->done = std::move(done);
  // An empty fetch is queued too, on lane 0, so that it completes in its turn and after `after`.
  const bool empty = fetch->num_slices() == 0;
  submission->num_slices_left.store(empty ? 1 : fetch->num_slices(), std::memory_order_relaxed);
  if (empty) {
    push(lanes_.front(), submission);
    return;
  }
  // Reads `fetch`, not the submission, which may be finished and reused after the last push.
  for (std::size_t i = 0; i < fetch->lanes().size(); ++i) {
    if (!fetch->lanes()[i].empty()) push(lanes_[i], submission);
  }
}

std::size_t CopyEngine::State::fetch_activated(const Demand& demand, const void* indices,
                                               std::size_t count, std::size_t index_bytes) {
  {
    const std::lock_guard<std::mutex> lock(submit_mutex_);
    DWDP_CHECK(!closing_, "experts were demanded from a closed copy engine");
  }
  const std::int64_t start_ns = now_ns();
  const std::size_t num_bytes = demand.fetch(indices, count, index_bytes);
  if (num_bytes > 0) {
    const std::lock_guard<std::mutex> lock(demand_mutex_);
    demand_spans_.record({start_ns, now_ns(), demand.layer(), num_bytes});
  }
  return num_bytes;
}

std::vector<std::vector<Span>> CopyEngine::State::drain_spans() {
  std::vector<std::vector<Span>> spans;
  spans.reserve(lanes_.size() + 1);
  for (Lane& lane : lanes_) spans.push_back(lane.spans.drain());
  spans.push_back(demand_spans_.drain());
  return spans;
}

void CopyEngine::State::push(Lane& lane, Submission* submission) {
  {
    const std::lock_guard<std::mutex> lock(lane.mutex);
    lane.queue.push(submission);
  }
  lane.work.notify_all();
}

void CopyEngine::State::finish(Submission& submission) {
  const std::shared_ptr<const Fetch> fetch = std::move(submission.fetch);
  const std::shared_ptr<Event> after = std::move(submission.after);
  const std::shared_ptr<Event> done = std::move(submission.done);
  const std::uint64_t generation = submission.done_generation;
  {
    const std::lock_guard<std::mutex> lock(pool_mutex_);
    free_.push_back(&submission);
  }
  done->complete(generation);
}

void CopyEngine::State::run(std::size_t lane_index) {
  Lane& lane = lanes_[lane_index];
  std::unique_lock<std::mutex> lock(lane.mutex);
  while (true) {
    lane.work.wait(lock, [&] { return !lane.queue.empty() || lane.closing; });
    if (lane.queue.empty()) return;
    Submission& submission = *lane.queue.front();
    if (submission.after && !submission.after->completed(submission.after_generation)) {
      // While this thread waits, another may finish the submission: keep what is waited for.
      const std::shared_ptr<Event> after = submission.after;
      const std::uint64_t generation = submission.after_generation;
      lock.unlock();
      after->wait(generation);
      lock.lock();
      continue;
    }
    const Copy copy = take_slice(lane, lane_index);
    lock.unlock();
    if (copy.num_bytes > 0) std::memcpy(copy.dst, copy.src, copy.num_bytes);
    lock.lock();
    if (copy.num_bytes > 0) end_slice(lane, lane_index, submission);
    // Whoever ends the last slice has seen the end of all others, and completes the event.
    if (submission.num_slices_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      lock.unlock();
      finish(submission);
      lock.lock();
    }
  }
}

Copy CopyEngine::State::take_slice(Lane& lane, std::size_t lane_index) {
  Submission& submission = *lane.queue.front();
  const Fetch& fetch = *submission.fetch;
  if (fetch.num_slices() == 0) {
    lane.queue.pop();
    return {nullptr, nullptr, 0};
  }
  const std::vector<Copy>& slices = fetch.lanes()[lane_index];
  LanePart& part = submission.parts[lane_index];
  if (lane.next_slice == 0) part = {now_ns(), slices.size(), 0};
  const Copy copy = slices[lane.next_slice++];
  part.num_bytes += copy.num_bytes;
  if (lane.next_slice == slices.size()) {
    lane.queue.pop();
    lane.next_slice = 0;
  }
  return copy;
}

void CopyEngine::State::end_slice(Lane& lane, std::size_t lane_index, Submission& submission) {
  LanePart& part = submission.parts[lane_index];
  if (--part.num_slices_left > 0) return;
  const std::int64_t start_ns = std::max(part.start_ns, lane.last_end_ns);
  lane.last_end_ns = now_ns();
  lane.spans.record({start_ns, lane.last_end_ns, submission.fetch->layer(), part.num_bytes});
}

void CopyEngine::State::close() noexcept {
  {
    const std::lock_guard<std::mutex> lock(submit_mutex_);
    closing_ = true;
  }
  for (Lane& lane : lanes_) {
    {
      const std::lock_guard<std::mutex> lock(lane.mutex);
      lane.closing = true;
    }
    lane.work.notify_all();
  }
  const std::lock_guard<std::mutex> lock(join_mutex_);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

CopyEngine::CopyEngine(std::size_t num_lanes, std::size_t lane_depth)
    : num_lanes_(num_lanes), lane_depth_(lane_depth) {
  DWDP_CHECK(num_lanes > 0 && lane_depth > 0,
             "a copy engine needs at least one lane of depth one, ", "not ", num_lanes,
             " lanes of depth ", lane_depth);
  state_ = std::make_unique<State>(num_lanes, lane_depth);
}

CopyEngine::~CopyEngine() noexcept {
  close();
  // A forked child has copies of locks and condition variables that may be held for ever.
  if (state_ && state_->forked()) state_.release();
}

std::shared_ptr<const Fetch> CopyEngine::prepare(
    std::vector<std::vector<Copy>> lanes, std::vector<std::shared_ptr<const void>> keep_mapped,
    std::size_t layer) const {
  DWDP_CHECK(lanes.size() <= num_lanes_, "a fetch of ", lanes.size(),
             " lanes does not fit a copy engine of ", num_lanes_);
  return std::make_shared<const Fetch>(std::move(lanes), std::move(keep_mapped), layer);
}

void CopyEngine::submit(std::shared_ptr<const Fetch> fetch, std::shared_ptr<Event> after,
                        std::shared_ptr<Event> done) {
  DWDP_CHECK(fetch->lanes().size() <= num_lanes_, "a fetch of ", fetch->lanes().size(),
             " lanes does not fit a copy engine of ", num_lanes_);
  DWDP_CHECK(!state_->forked(),
             "the copy engine belongs to the parent process: its threads do not exist in a fork");
  state_->submit(std::move(fetch), std::move(after), std::move(done));
}

std::size_t CopyEngine::fetch_activated(const Demand& demand, const void* indices,
                                        std::size_t count, std::size_t index_bytes) {
  return state_->fetch_activated(demand, indices, count, index_bytes);
}

std::vector<std::vector<Span>> CopyEngine::drain_spans() {
  if (state_->forked()) return {};
  return state_->drain_spans();
}

void CopyEngine::close() noexcept {
  if (state_ && !state_->forked()) state_->close();
}

}  // namespace dwdp::host
