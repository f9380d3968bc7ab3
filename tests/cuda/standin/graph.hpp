// Graphs, and streams captured into them.
#pragma once

#include <cuda.h>

#include <memory>
#include <thread>
#include <vector>

#include "core.hpp"
#include "stream.hpp"

namespace standin {

struct Graph;

struct Node {
  CUgraphNode handle = nullptr;
  CUgraphNodeType type = CU_GRAPH_NODE_TYPE_EMPTY;
  Action action;
  std::weak_ptr<Event> event;  // of record and wait nodes
  std::vector<std::shared_ptr<Node>> dependencies;
  Graph* graph = nullptr;
};

using Nodes = std::vector<std::shared_ptr<Node>>;

struct Graph {
  Nodes nodes;
  CUgraph handle = nullptr;
};

// One capture sequence. Guarded by api_mutex.
struct Capture {
  std::uint64_t id = 0;
  std::shared_ptr<Graph> graph;
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::thread::id thread;
  std::weak_ptr<Stream> origin;
  std::vector<std::weak_ptr<Stream>> streams;
  bool invalidated = false;
};

Registry<CUgraph, Graph>& graphs();
Registry<CUgraphNode, Node>& nodes();

std::shared_ptr<Node> add_node(Graph& graph, CUgraphNodeType type, Action action,
                               Nodes dependencies, std::shared_ptr<Event> event = nullptr);

// Nodes of `graph` by their handles; false when one is not of it.
bool find_nodes(const Graph& graph, const CUgraphNode* handles, std::size_t count, Nodes* found);

// "graphs" or "graph_execs"; -1 for others.
std::int64_t live_graphs(const char* kind);

// Forgets the handles of a graph's nodes.
void drop_nodes(const Graph& graph);

// Adds a node that the next work of a capturing stream depends on. With api_mutex.
CUresult capture_node(Stream& stream, CUgraphNodeType type, Action action,
                      std::shared_ptr<Event> event = nullptr);

// Makes `stream` take part in the capture of an event that was recorded in it. With api_mutex.
CUresult join_capture(Stream& stream, Event& event);

// STREAM_CAPTURE_IMPLICIT, and the end of the capture, when the legacy stream is used while a
// blocking stream of its context is captured. With api_mutex.
CUresult check_legacy_use(Stream& stream);

// A stream leaves its capture: forcibly, as when it is destroyed. With api_mutex.
void abandon_capture(Stream& stream);

}  // namespace standin
