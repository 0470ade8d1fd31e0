// Streams, and what capturing them into graphs means for the other calls.
//
// Work runs to its end within the call that enqueues it, so a stream is always idle: only handles,
// and the rules of stream capture (CUDA Programming Guide, "CUDA Graphs"), are left to check.
#pragma once

#include <functional>
#include <vector>

#include "runtime/cuda_api.h"

namespace emulator {

// One captured operation. Nodes are kept in the order of capture, which respects their
// dependencies.
struct GraphNode {
  cudaGraphNodeType type;
  std::function<void()> work;
};
using GraphNodes = std::vector<GraphNode>;

// Runs the work, or records it where the stream captures. Throws CudaError:
// cudaErrorInvalidResourceHandle, cudaErrorStreamCaptureInvalidated, and
// cudaErrorStreamCaptureImplicit for the legacy stream while a stream that synchronises with it
// captures.
void enqueue(cudaStream_t stream, cudaGraphNodeType type, std::function<void()> work);

bool is_capturing(cudaStream_t stream);

// For calls that may synchronise, such as cudaMalloc: where the present thread is captured, or
// another thread captures in the global mode (cudaThreadExchangeStreamCaptureMode), the captures
// are invalidated and CudaError(cudaErrorStreamCaptureUnsupported) is thrown.
void refuse_while_capturing();

// For work on `stream` that cannot be captured: invalidates its capture, if there is one, and
// throws CudaError(cudaErrorStreamCaptureUnsupported).
void refuse_if_capturing(cudaStream_t stream, const char* why);

// Destroys every stream, event and graph, and drops the captures.
void reset_streams();
void reset_graphs();

// The graph that cudaStreamEndCapture returns.
cudaGraph_t add_graph(GraphNodes nodes);

}  // namespace emulator
