// Graphs: their nodes, executable copies, and launching those.
#include <algorithm>

#include "graph.hpp"

namespace standin {
namespace {

struct ExecNode {
  CUgraphNodeType type;
  Action action;
  std::weak_ptr<Event> event;
  std::size_t num_dependencies;
  std::vector<std::size_t> dependents;
};

// Nodes in an order in which each comes after what it depends on.
struct Exec {
  std::vector<ExecNode> nodes;
  SignalPtr last_launch;  // guarded by api_mutex
};

// One launch: per node, the record it makes or waits for.
struct Launch {
  std::shared_ptr<const Exec> exec;
  std::shared_ptr<Context> context;
  std::vector<SignalPtr> signals;
};

// Runs the nodes of a launch, those that do not depend on each other at the same time.
class Run {
 public:
  explicit Run(const Launch& launch)
      : launch_(launch), remaining_(launch.exec->nodes.size()), salt_(new_handle()) {
    for (std::size_t i = 0; i < remaining_.size(); ++i) {
      remaining_[i] = launch.exec->nodes[i].num_dependencies;
    }
  }

  void operator()() {
    std::vector<std::size_t> roots;
    for (std::size_t i = 0; i < remaining_.size(); ++i) {
      if (launch_.exec->nodes[i].num_dependencies == 0) roots.push_back(i);
    }
    start_all_but_first(roots);
    if (!roots.empty()) chain(roots.front());
    while (true) {
      std::thread thread;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (threads_.empty()) return;
        thread = std::move(threads_.back());
        threads_.pop_back();
      }
      thread.join();
    }
  }

 private:
  // A thread for each, so that a node that waits for an event holds up nothing but its dependents.
  void start_all_but_first(const std::vector<std::size_t>& ready) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::size_t i = 1; i < ready.size(); ++i) {
      threads_.emplace_back([this, node = ready[i]] { chain(node); });
    }
  }

  // Runs a node and then, here, the first of what has become ready by it.
  void chain(std::size_t index) {
    Jitter jitter(salt_ + index);
    while (true) {
      jitter.sleep();
      run(index);
      std::vector<std::size_t> ready;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const std::size_t dependent : launch_.exec->nodes[index].dependents) {
          if (--remaining_[dependent] == 0) ready.push_back(dependent);
        }
      }
      if (ready.empty()) return;
      start_all_but_first(ready);
      index = ready.front();
    }
  }

  void run(std::size_t index) {
    const ExecNode& node = launch_.exec->nodes[index];
    const SignalPtr& signal = launch_.signals[index];
    if (node.type == CU_GRAPH_NODE_TYPE_EVENT_RECORD) {
      signal->complete();
    } else if (node.type == CU_GRAPH_NODE_TYPE_WAIT_EVENT) {
      if (signal != nullptr) signal->wait();
    } else if (node.action != nullptr && launch_.context->error == CUDA_SUCCESS) {
      if (const CUresult result = node.action(); result != CUDA_SUCCESS) {
        launch_.context->fail(result);
      }
    }
  }

  const Launch& launch_;
  std::mutex mutex_;
  std::vector<std::size_t> remaining_;
  std::vector<std::thread> threads_;
  const std::uint64_t salt_;
};

Registry<CUgraphExec, Exec>& execs() {
  static auto& instance = *new Registry<CUgraphExec, Exec>;
  return instance;
}

// Null when the dependencies go round in a circle.
std::shared_ptr<Exec> compile(const Graph& graph) {
  auto exec = std::make_shared<Exec>();
  std::map<const Node*, std::size_t> position;
  while (position.size() < graph.nodes.size()) {
    const std::size_t before = position.size();
    for (const auto& node : graph.nodes) {
      if (position.count(node.get()) != 0) continue;
      const auto& needed = node->dependencies;
      if (!std::all_of(needed.begin(), needed.end(),
                       [&](const auto& other) { return position.count(other.get()) != 0; })) {
        continue;
      }
      const std::size_t index = position.size();
      position[node.get()] = index;
      exec->nodes.push_back({node->type, node->action, node->event, needed.size(), {}});
      for (const auto& other : needed) {
        exec->nodes[position[other.get()]].dependents.push_back(index);
      }
    }
    if (position.size() == before) return nullptr;
  }
  return exec;
}

CUresult instantiate(CUgraphExec* handle, CUgraph graph_handle) {
  const auto graph = graphs().find(graph_handle);
  if (graph == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const std::lock_guard<std::mutex> lock(api_mutex());
  auto exec = compile(*graph);
  if (exec == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *handle = execs().add(std::move(exec));
  return CUDA_SUCCESS;
}

// In the order of the nodes, a record issues a new signal of its event and a wait takes the newest.
// INVALID_VALUE when an event of the graph has been destroyed.
CUresult issue_events(Launch& launch) {
  std::vector<std::shared_ptr<Event>> events_of_nodes;
  for (const ExecNode& node : launch.exec->nodes) {
    const bool has_event =
        node.type == CU_GRAPH_NODE_TYPE_EVENT_RECORD || node.type == CU_GRAPH_NODE_TYPE_WAIT_EVENT;
    events_of_nodes.push_back(node.event.lock());
    if (has_event && events_of_nodes.back() == nullptr) return CUDA_ERROR_INVALID_VALUE;
  }
  for (std::size_t i = 0; i < events_of_nodes.size(); ++i) {
    SignalPtr signal;
    if (const auto& event = events_of_nodes[i]; event != nullptr) {
      if (launch.exec->nodes[i].type == CU_GRAPH_NODE_TYPE_EVENT_RECORD) {
        event->latest = std::make_shared<Signal>();
        event->captured = false;
      }
      signal = event->latest;
    }
    launch.signals.push_back(std::move(signal));
  }
  return CUDA_SUCCESS;
}

}  // namespace

Registry<CUgraph, Graph>& graphs() {
  static auto& instance = *new Registry<CUgraph, Graph>;
  return instance;
}

std::int64_t live_graphs(const char* kind) {
  const std::string name(kind);
  if (name == "graphs") return static_cast<std::int64_t>(graphs().size());
  if (name == "graph_execs") return static_cast<std::int64_t>(execs().size());
  return -1;
}

}  // namespace standin

using standin::api_mutex;
using standin::graphs;

CUresult cuGraphCreate(CUgraph* phGraph, unsigned int flags) {
  STANDIN_ENTER();
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  auto graph = std::make_shared<standin::Graph>();
  *phGraph = graphs().add(graph);
  graph->handle = *phGraph;
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph hGraph) {
  STANDIN_ENTER();
  const auto graph = graphs().remove(hGraph);
  if (graph == nullptr) return CUDA_ERROR_INVALID_VALUE;
  standin::drop_nodes(*graph);
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* phGraphExec, CUgraph hGraph,
                                     unsigned long long flags) {
  STANDIN_ENTER();
  (void)flags;
  return standin::instantiate(phGraphExec, hGraph);
}

CUresult cuGraphExecDestroy(CUgraphExec hGraphExec) {
  STANDIN_ENTER();
  return standin::execs().remove(hGraphExec) == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGraphUpload(CUgraphExec hGraphExec, CUstream hStream) {
  STANDIN_ENTER();
  std::shared_ptr<standin::Stream> stream;
  if (standin::execs().find(hGraphExec) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return standin::find_stream(hStream, &stream);
}

CUresult cuGraphLaunch(CUgraphExec hGraphExec, CUstream hStream) {
  STANDIN_ENTER();
  const auto exec = standin::execs().find(hGraphExec);
  if (exec == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::shared_ptr<standin::Stream> stream;
  STANDIN_TRY(standin::find_stream(hStream, &stream));
  const std::lock_guard<std::mutex> lock(api_mutex());
  STANDIN_TRY(standin::check_legacy_use(*stream));
  if (stream->capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  standin::Launch launch{exec, stream->context(), {}};
  STANDIN_TRY(standin::issue_events(launch));
  // Launches of one executable graph follow each other, whatever their streams.
  exec->last_launch = stream->enqueue(
      [launch = std::move(launch), before = exec->last_launch] {
        if (before != nullptr) before->wait();
        standin::Run run(launch);
        run();
        return CUDA_SUCCESS;
      },
      /*always=*/true);
  return CUDA_SUCCESS;
}
