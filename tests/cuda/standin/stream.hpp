// Streams and events. A stream is a thread with a queue, so that work is really concurrent and
// late.
#pragma once

#include <cuda.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "core.hpp"
#include "device.hpp"

namespace standin {

struct Capture;
struct Node;

// The end of one piece of work.
class Signal {
 public:
  void complete();
  void wait();
  bool done() const { return done_.load(std::memory_order_acquire); }
  std::chrono::steady_clock::time_point time() const { return time_; }

 private:
  std::atomic<bool> done_{false};
  std::chrono::steady_clock::time_point time_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

using SignalPtr = std::shared_ptr<Signal>;

// Random delays of up to STANDIN_JITTER_US; the same for one STANDIN_SEED and salt.
class Jitter {
 public:
  explicit Jitter(std::uint64_t salt);
  void sleep();

 private:
  std::mt19937_64 random_;
};

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(std::shared_ptr<Context> context, unsigned int flags, int priority, bool legacy);

  // Appends work; the signal completes when it has run. Work is skipped when the context is broken,
  // unless it is to run `always`. With api_mutex.
  SignalPtr enqueue(Action action, bool always = false);
  SignalPtr tail() const;
  bool idle() const;

  // No more work comes: the thread ends when the queue is empty.
  void close();

  const std::shared_ptr<Context>& context() const { return context_; }
  unsigned int flags() const { return flags_; }
  int priority() const { return priority_; }
  bool legacy() const { return legacy_; }
  bool blocking() const { return !legacy_ && (flags_ & CU_STREAM_NON_BLOCKING) == 0; }

  // Of a stream that is being captured; guarded by api_mutex.
  std::shared_ptr<Capture> capture;
  std::vector<std::shared_ptr<Node>> dependencies;
  std::vector<CUgraphNode> dependency_handles;
  CUstream handle = nullptr;

 private:
  struct Item {
    Action action;
    bool always;
    SignalPtr signal;
  };

  SignalPtr push(Action action, bool always);
  void run();

  const std::shared_ptr<Context> context_;
  const unsigned int flags_;
  const int priority_;
  const bool legacy_;
  Jitter jitter_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  SignalPtr tail_;
  bool started_ = false;
  bool closed_ = false;
};

struct Event {
  std::shared_ptr<Context> context;
  unsigned int flags = 0;

  // All below is guarded by api_mutex.
  SignalPtr latest;  // null: never recorded

  // Of an event that was last recorded in a capture.
  bool captured = false;
  std::weak_ptr<Capture> capture;
  std::vector<std::shared_ptr<Node>> captured_nodes;
};

Registry<CUstream, Stream>& streams();
Registry<CUevent, Event>& events();

// The stream, or the legacy one of the current context for 0 and CU_STREAM_LEGACY.
CUresult find_stream(CUstream handle, std::shared_ptr<Stream>* stream);
CUresult find_event(CUevent handle, std::shared_ptr<Event>* event);

// Runs `action` in the stream, or adds it to the graph that the stream is captured into.
CUresult submit(CUstream handle, CUgraphNodeType type, Action action,
                std::shared_ptr<Event> event = nullptr);

// Calls a user's function as streams do.
Action host_action(CUhostFn function, void* argument);

// For calls that stream capture forbids: those whose effect is not in the order of a stream, and
// waiting in the host. They end the capture.
CUresult check_capture_allows();

// Wait in the host for everything in the current context, or for its legacy stream and with it the
// blocking ones.
CUresult synchronize_context();
CUresult synchronize_legacy();

// Streams of a context, its legacy one included. With api_mutex.
std::vector<std::shared_ptr<Stream>> live_streams(Context& context);

std::shared_ptr<Stream> make_legacy_stream(const std::shared_ptr<Context>& context);

// Removes what dies with a context; returns how much that was.
std::size_t drop_streams_and_events(const Context& context);

}  // namespace standin
