// Adding nodes to graphs by hand.
#include <algorithm>

#include "graph.hpp"
#include "memory.hpp"

namespace standin {
namespace {

// CUDA_MEMCPY3D between pitched, one-, two- or three-dimensional pointers.
struct Side {
  CUdeviceptr base;
  std::size_t pitch, height, x, y, z;

  CUdeviceptr row(std::size_t j, std::size_t k) const {
    return base + ((z + k) * height + y + j) * pitch + x;
  }
};

CUresult copy_rows(const Side& dst, const Side& src, std::size_t width, std::size_t height,
                   std::size_t depth) {
  for (std::size_t k = 0; k < depth; ++k) {
    for (std::size_t j = 0; j < height; ++j) {
      STANDIN_TRY(AddressSpace::instance().copy(dst.row(j, k), src.row(j, k), width));
    }
  }
  return CUDA_SUCCESS;
}

bool is_pointer(CUmemorytype type) {
  return type == CU_MEMORYTYPE_DEVICE || type == CU_MEMORYTYPE_HOST ||
         type == CU_MEMORYTYPE_UNIFIED;
}

CUresult add(CUgraphNode* handle, CUgraph graph_handle, const CUgraphNode* dependencies,
             std::size_t count, CUgraphNodeType type, Action action,
             std::shared_ptr<Event> event = nullptr) {
  const auto graph = graphs().find(graph_handle);
  const std::lock_guard<std::mutex> lock(api_mutex());
  Nodes found;
  if (graph == nullptr || !find_nodes(*graph, dependencies, count, &found)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const auto node = add_node(*graph, type, std::move(action), std::move(found), std::move(event));
  if (handle != nullptr) *handle = node->handle;
  return CUDA_SUCCESS;
}

}  // namespace

Registry<CUgraphNode, Node>& nodes() {
  static auto& instance = *new Registry<CUgraphNode, Node>;
  return instance;
}

std::shared_ptr<Node> add_node(Graph& graph, CUgraphNodeType type, Action action,
                               Nodes dependencies, std::shared_ptr<Event> event) {
  auto node = std::make_shared<Node>();
  node->type = type;
  node->action = std::move(action);
  node->event = event;
  node->dependencies = std::move(dependencies);
  node->graph = &graph;
  node->handle = nodes().add(node);
  graph.nodes.push_back(node);
  return node;
}

bool find_nodes(const Graph& graph, const CUgraphNode* handles, std::size_t count, Nodes* found) {
  for (std::size_t i = 0; i < count; ++i) {
    auto node = nodes().find(handles[i]);
    if (node == nullptr || node->graph != &graph) return false;
    found->push_back(std::move(node));
  }
  return true;
}

void drop_nodes(const Graph& graph) {
  for (const auto& node : graph.nodes) nodes().remove(node->handle);
}

}  // namespace standin

using standin::Side;

CUresult cuGraphAddMemcpyNode(CUgraphNode* phGraphNode, CUgraph hGraph,
                              const CUgraphNode* dependencies, size_t numDependencies,
                              const CUDA_MEMCPY3D* copyParams, CUcontext ctx) {
  STANDIN_ENTER();
  (void)ctx;
  const CUDA_MEMCPY3D& p = *copyParams;
  if (!standin::is_pointer(p.srcMemoryType) || !standin::is_pointer(p.dstMemoryType)) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (p.WidthInBytes == 0 || p.Height == 0 || p.Depth == 0 || p.srcLOD != 0 || p.dstLOD != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const bool src_host = p.srcMemoryType == CU_MEMORYTYPE_HOST;
  const bool dst_host = p.dstMemoryType == CU_MEMORYTYPE_HOST;
  const Side src{src_host ? reinterpret_cast<CUdeviceptr>(p.srcHost) : p.srcDevice,
                 p.srcPitch,
                 p.srcHeight,
                 p.srcXInBytes,
                 p.srcY,
                 p.srcZ};
  const Side dst{dst_host ? reinterpret_cast<CUdeviceptr>(p.dstHost) : p.dstDevice,
                 p.dstPitch,
                 p.dstHeight,
                 p.dstXInBytes,
                 p.dstY,
                 p.dstZ};
  auto& space = standin::AddressSpace::instance();
  if (!space.accessible(src.row(0, 0), p.WidthInBytes, /*write=*/false) ||
      !space.accessible(dst.row(0, 0), p.WidthInBytes, /*write=*/true)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return standin::add(phGraphNode, hGraph, dependencies, numDependencies, CU_GRAPH_NODE_TYPE_MEMCPY,
                      [dst, src, width = p.WidthInBytes, height = p.Height, depth = p.Depth] {
                        return standin::copy_rows(dst, src, width, height, depth);
                      });
}

CUresult cuGraphAddEmptyNode(CUgraphNode* phGraphNode, CUgraph hGraph,
                             const CUgraphNode* dependencies, size_t numDependencies) {
  STANDIN_ENTER();
  return standin::add(phGraphNode, hGraph, dependencies, numDependencies, CU_GRAPH_NODE_TYPE_EMPTY,
                      nullptr);
}

CUresult cuGraphAddHostNode(CUgraphNode* phGraphNode, CUgraph hGraph,
                            const CUgraphNode* dependencies, size_t numDependencies,
                            const CUDA_HOST_NODE_PARAMS* nodeParams) {
  STANDIN_ENTER();
  return standin::add(phGraphNode, hGraph, dependencies, numDependencies, CU_GRAPH_NODE_TYPE_HOST,
                      standin::host_action(nodeParams->fn, nodeParams->userData));
}

CUresult cuGraphAddEventRecordNode(CUgraphNode* phGraphNode, CUgraph hGraph,
                                   const CUgraphNode* dependencies, size_t numDependencies,
                                   CUevent event) {
  STANDIN_ENTER();
  std::shared_ptr<standin::Event> found;
  STANDIN_TRY(standin::find_event(event, &found));
  return standin::add(phGraphNode, hGraph, dependencies, numDependencies,
                      CU_GRAPH_NODE_TYPE_EVENT_RECORD, nullptr, std::move(found));
}

CUresult cuGraphAddEventWaitNode(CUgraphNode* phGraphNode, CUgraph hGraph,
                                 const CUgraphNode* dependencies, size_t numDependencies,
                                 CUevent event) {
  STANDIN_ENTER();
  std::shared_ptr<standin::Event> found;
  STANDIN_TRY(standin::find_event(event, &found));
  return standin::add(phGraphNode, hGraph, dependencies, numDependencies,
                      CU_GRAPH_NODE_TYPE_WAIT_EVENT, nullptr, std::move(found));
}

CUresult cuGraphGetNodes(CUgraph hGraph, CUgraphNode* nodes, size_t* numNodes) {
  STANDIN_ENTER();
  const auto graph = standin::graphs().find(hGraph);
  if (graph == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const std::lock_guard<std::mutex> lock(standin::api_mutex());
  const std::size_t available = graph->nodes.size();
  if (nodes == nullptr) {
    *numNodes = available;
    return CUDA_SUCCESS;
  }
  const std::size_t wanted = *numNodes;
  for (std::size_t i = 0; i < wanted; ++i) {
    nodes[i] = i < available ? graph->nodes[i]->handle : nullptr;
  }
  *numNodes = std::min(wanted, available);
  return CUDA_SUCCESS;
}

CUresult cuGraphNodeGetType(CUgraphNode hNode, CUgraphNodeType* type) {
  STANDIN_ENTER();
  const auto node = standin::nodes().find(hNode);
  if (node == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *type = node->type;
  return CUDA_SUCCESS;
}
