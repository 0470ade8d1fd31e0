// Graphs that stream capture made.
#include <memory>
#include <string>
#include <utility>

#include "runtime/errors.h"
#include "runtime/handles.h"
#include "runtime/streams.h"

namespace emulator {

namespace {

struct State {
  Handles<GraphNodes, cudaGraph_t> graphs{"graph"};
  Handles<GraphNodes, cudaGraphExec_t> executables{"executable graph"};
};

State& state() {
  static State& state = *new State;
  return state;
}

}  // namespace

cudaGraph_t add_graph(GraphNodes nodes) {
  return state().graphs.add(std::move(nodes));
}

void reset_graphs() {
  state().graphs.clear();
  state().executables.clear();
}

}  // namespace emulator

using namespace emulator;

extern "C" {

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long flags) {
  return run_call("cudaGraphInstantiate", [&] {
    require(executable, "pGraphExec");
    if (flags != 0) {
      throw CudaError(cudaErrorNotSupported, "flags is " + std::to_string(flags));
    }
    *executable = state().executables.add(state().graphs.get(graph));
  });
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}

// In a stream that captures, the graph's nodes become part of the new graph.
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return run_call("cudaGraphLaunch", [&] {
    for (const GraphNode& node : state().executables.get(executable)) {
      enqueue(stream, node.type, node.work);
    }
  });
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return run_call("cudaGraphGetNodes", [&] {
    require(count, "numNodes");
    if (nodes != nullptr) throw CudaError(cudaErrorNotSupported, "nodes have no handles here");
    *count = state().graphs.get(graph).size();
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return run_call("cudaGraphDestroy", [&] { state().graphs.remove(graph); });
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return run_call("cudaGraphExecDestroy", [&] { state().executables.remove(executable); });
}
}
