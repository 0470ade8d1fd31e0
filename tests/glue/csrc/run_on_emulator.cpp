// kernels::run as csrc/torch/cuda finds it in the build of the tests: the real one, on the emulated
// GPU.
#include <vector>

#include "device_memory.h"
#include "real_kernels.h"
#include "torch/cuda/device.h"
#include "torch/cuda/stream.h"

namespace fused_lora {
namespace {

using glue::DeviceMemory;
using namespace kernels;

cudaStream_t stream_in_use = nullptr;

void place_dropout(DeviceMemory& memory, Dropout& dropout) {
  dropout.seed = static_cast<const int64_t*>(memory.input("seed", dropout.seed, sizeof(int64_t)));
}

const RowAdapter* row_adapters(DeviceMemory& memory, const RowAdapter* host, int64_t rows) {
  const auto bytes = rows * static_cast<int64_t>(sizeof(RowAdapter));
  return static_cast<const RowAdapter*>(memory.input("row_adapters", host, bytes));
}

// The call's operands in the device's memory.
ForwardCall placed(DeviceMemory& memory, const ForwardCall& call) {
  const Problem& p = call.problem;
  const int64_t bytes = bytes_of(p.dtype), adapter_bytes = bytes_of(p.adapter_dtype);
  ForwardCall on_device = call;
  on_device.x = memory.input("x", call.x, p.rows, p.in_features, bytes);
  on_device.weight = memory.input("weight", call.weight, p.out_features, p.in_features, bytes);
  on_device.lora_a = memory.input("lora_a", call.lora_a, p.rank, p.in_features, adapter_bytes);
  on_device.lora_b = memory.input("lora_b", call.lora_b, p.out_features, p.rank, adapter_bytes);
  on_device.bias = memory.input("bias", call.bias, p.out_features * bytes);
  place_dropout(memory, on_device.dropout);
  on_device.row_adapters = row_adapters(memory, call.row_adapters, p.rows);
  if (call.y == call.base) {
    const MatrixView y = {call.base, call.base_stride};
    on_device.y = memory.updated("y", y, p.rows, p.out_features, bytes);
    on_device.base = on_device.y;
  } else {
    const MatrixView base = {call.base, call.base_stride};
    on_device.base = memory.input("base", base, p.rows, p.out_features, bytes).data;
    on_device.y = memory.output("y", call.y, p.rows * p.out_features * bytes);
  }
  on_device.h = memory.output("h", {call.h, stride_or_dense(call.h_stride, p.rank)}, p.rows, p.rank,
                              bytes_of(rank_dtype(p)));
  return on_device;
}

BackwardCall placed(DeviceMemory& memory, const BackwardCall& call) {
  const Problem& p = call.problem;
  const int64_t bytes = bytes_of(p.dtype), adapter_bytes = bytes_of(p.adapter_dtype);
  BackwardCall on_device = call;
  on_device.dy = memory.input("dy", call.dy, p.rows, p.out_features, bytes);
  on_device.x = memory.input("x", call.x, p.rows, p.in_features, bytes);
  on_device.weight = memory.input("weight", call.weight, p.out_features, p.in_features, bytes);
  on_device.lora_a = memory.input("lora_a", call.lora_a, p.rank, p.in_features, adapter_bytes);
  on_device.lora_b = memory.input("lora_b", call.lora_b, p.out_features, p.rank, adapter_bytes);
  const MatrixView h = {call.h, stride_or_dense(call.h_stride, p.rank)};
  on_device.h = memory.input("h", h, p.rows, p.rank, bytes_of(rank_dtype(p))).data;
  place_dropout(memory, on_device.dropout);
  on_device.row_adapters = row_adapters(memory, call.row_adapters, p.rows);
  const MatrixView dx = {call.dx, p.in_features};
  on_device.dx = call.adds_to_dx ? memory.updated("dx", dx, p.rows, p.in_features, bytes)
                                 : memory.output("dx", call.dx, p.rows * p.in_features * bytes);
  on_device.dlora_a =
      memory.output("dlora_a", call.dlora_a, p.rank * p.in_features * adapter_bytes);
  on_device.dlora_b =
      memory.output("dlora_b", call.dlora_b, p.out_features * p.rank * adapter_bytes);
  return on_device;
}

// What a graph captures has not run yet.
cudaError_t finish(DeviceMemory& memory, cudaError_t error, cudaStream_t stream) {
  if (error == cudaSuccess && !cuda::is_capturing(stream)) memory.fetch();
  return error;
}

}  // namespace

namespace kernels {

cudaError_t run(const ForwardCall& call, const ForwardPlan& plan, void* workspace,
                cudaStream_t stream) {
  DeviceMemory memory;
  const ForwardCall on_device = placed(memory, call);
  void* const scratch = memory.workspace(workspace, static_cast<int64_t>(plan.workspace_bytes));
  return finish(memory, real_forward(on_device, plan, scratch, stream), stream);
}

cudaError_t run(const BackwardCall& call, const BackwardPlan& plan, void* workspace,
                cudaStream_t stream) {
  DeviceMemory memory;
  const BackwardCall on_device = placed(memory, call);
  void* const scratch = memory.workspace(workspace, static_cast<int64_t>(plan.workspace_bytes));
  return finish(memory, real_backward(on_device, plan, scratch, stream), stream);
}

cudaError_t run(const ForwardCall* calls, const GroupPlan<ForwardPlan>& plan, void* workspace,
                cudaStream_t stream) {
  DeviceMemory memory;
  std::vector<ForwardCall> on_device;
  for (size_t i = 0; i < plan.calls.size(); ++i) {
    on_device.push_back(placed(memory, calls[i]));
    on_device.back().x = on_device.front().x;
  }
  void* const scratch = memory.workspace(workspace, static_cast<int64_t>(plan.workspace_bytes));
  return finish(memory, real_forward_group(on_device.data(), plan, scratch, stream), stream);
}

// x and dx are one for all.
cudaError_t run(const BackwardCall* calls, const GroupPlan<BackwardPlan>& plan, void* workspace,
                cudaStream_t stream) {
  DeviceMemory memory;
  std::vector<BackwardCall> on_device;
  MatrixView x;
  void* dx = nullptr;
  for (size_t i = 0; i < plan.calls.size(); ++i) {
    BackwardCall call = calls[i];
    if (dx != nullptr) call.dx = nullptr;  // placed already
    BackwardCall& made = on_device.emplace_back(placed(memory, call));
    if (x.data == nullptr) x = made.x;
    if (dx == nullptr) dx = made.dx;
    if (calls[i].x.data != nullptr) made.x = x;
    if (calls[i].dx != nullptr) made.dx = dx;
  }
  void* const scratch = memory.workspace(workspace, static_cast<int64_t>(plan.workspace_bytes));
  return finish(memory, real_backward_group(on_device.data(), plan, scratch, stream), stream);
}

cudaError_t run(const MaskCall& call, cudaStream_t stream) {
  constexpr int64_t kBytes[] = {1, 4, 8, 2, 2};  // of MaskDType
  DeviceMemory memory;
  MaskCall on_device = call;
  on_device.seed = static_cast<const int64_t*>(memory.input("seed", call.seed, sizeof(int64_t)));
  on_device.out = memory.output("mask", call.out,
                                call.rows * call.columns * kBytes[static_cast<int>(call.dtype)]);
  return finish(memory, real_mask(on_device, stream), stream);
}

cudaError_t run(const RowAdaptersCall& call, cudaStream_t stream) {
  DeviceMemory memory;
  RowAdaptersCall on_device = call;
  on_device.index = static_cast<const int64_t*>(
      memory.input("index", call.index, call.rows * static_cast<int64_t>(sizeof(int64_t))));
  on_device.out = static_cast<RowAdapter*>(memory.output(
      "row_adapters", call.out, call.rows * static_cast<int64_t>(sizeof(RowAdapter))));
  return finish(memory, real_row_adapters(on_device, stream), stream);
}

}  // namespace kernels

namespace cuda {

cudaStream_t current_stream(c10::Device) {
  return stream_in_use;
}

}  // namespace cuda

// Makes a stream of the emulated runtime torch's current one.
extern "C" __attribute__((visibility("default"))) void glue_set_stream(cudaStream_t stream) {
  stream_in_use = stream;
}

}  // namespace fused_lora
