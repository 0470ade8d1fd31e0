#include "torch/cpu/backend.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <chrono>

#include "common/dropout.h"
#include "cpu/dropout_mask.h"
#include "torch/cpu/level.h"
#include "torch/packed_weight.h"

namespace fused_lora::cpu {
namespace {

void run_in_torchs_pool(void* /*context*/, int64_t tasks, fused::Parallel::Body body,
                        void* closure) {
  at::parallel_for(0, tasks, /*grain_size=*/1,
                   [&](int64_t begin, int64_t end) { body(closure, begin, end); });
}

double milliseconds(const std::function<void()>& call) {
  const auto began = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began)
      .count();
}

}  // namespace

fused::DType kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat ? fused::DType::kFloat32 : fused::DType::kBFloat16;
}

fused::Parallel torchs_pool() {
  return {run_in_torchs_pool, nullptr, at::in_parallel_region() ? 1 : at::get_num_threads()};
}

namespace {

std::string dtype_obstacle(at::ScalarType dtype) {
  if (dtype == at::kFloat || dtype == at::kBFloat16) return level_obstacle();
  return std::string("there are no fused kernels for torch.")
      .append(dtype == at::kHalf ? "float16" : "float64")
      .append(" on the CPU");
}

}  // namespace

std::string Backend::obstacle(const at::Tensor& rows) {
  return dtype_obstacle(rows.scalar_type());
}

std::string Backend::add_obstacle(const at::Tensor& y, at::ScalarType dtype) {
  const std::string of_x = dtype_obstacle(dtype);
  return of_x.empty() ? dtype_obstacle(y.scalar_type()) : of_x;
}

fused::Problem Backend::add_problem(const at::Tensor& y, at::ScalarType dtype,
                                    const at::Tensor& lora_a, bool round_adapters) {
  fused::Problem p;
  p.rows = y.size(0);
  p.in_features = lora_a.size(1);
  p.out_features = y.size(1);
  p.rank = lora_a.size(0);
  p.dtype = kernel_dtype(dtype);
  p.adapter_dtype = kernel_dtype(lora_a.scalar_type());
  p.round_adapters = round_adapters && p.dtype != p.adapter_dtype;
  p.y_in_other_dtype = kernel_dtype(y.scalar_type()) != p.dtype;
  return p;
}

fused::MatrixView Backend::view(const at::Tensor& tensor) {
  if (is_packed(tensor)) return {tensor.const_data_ptr()};
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  // A dimension of one element has no stride, and what the tensor says of it is arbitrary.
  const int64_t column_stride = columns > 1 ? tensor.stride(1) : 1;
  return {tensor.const_data_ptr(), rows > 1 ? tensor.stride(0) : columns, column_stride};
}

fused::Problem Backend::problem(const at::Tensor& rows, const at::Tensor& weight,
                                const at::Tensor& lora_a, bool round_adapters) {
  fused::Problem p;
  p.rows = rows.size(0);
  p.in_features = in_features(weight);
  p.out_features = out_features(weight);
  p.rank = lora_a.size(0);
  p.dtype = kernel_dtype(rows.scalar_type());
  p.adapter_dtype = kernel_dtype(lora_a.scalar_type());
  p.round_adapters = round_adapters && p.dtype != p.adapter_dtype;
  p.weight_in_panels = is_packed(weight);
  return p;
}

fused::Dropout Backend::dropout(const composed::Dropout& dropout) {
  if (!dropout.active()) return {};
  const DropoutRule rule = DropoutRule::from_probability(dropout.p);
  return {static_cast<uint64_t>(*dropout.seed->const_data_ptr<int64_t>()), rule.keep,
          static_cast<float>(rule.scale), dropout.column_offset / kLanes};
}

at::Tensor Backend::mask(const at::Tensor& seed, int64_t rows, int64_t columns, double p,
                         int64_t row_offset, int64_t column_offset, at::ScalarType dtype) {
  return dropout_mask(seed, rows, columns, p, row_offset, column_offset, dtype);
}

Times Backend::time(const std::function<void()>& fused, const std::function<void()>& composed) {
  return time_in_turns([&] { return milliseconds(fused); }, [&] { return milliseconds(composed); });
}

// Past the dispatcher, where nobody is to see it: that takes longer than the allocation.
at::Tensor Backend::empty(at::IntArrayRef sizes, const at::Tensor& /*like*/, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype);
}

void Backend::complete(ShapeClass& shape) const {
  shape.threads = pool_.threads;
  shape.instructions = level_name();
}

void Backend::launch(const ForwardCall& call) const {
  launch_together(std::span(&call, 1));
}

void Backend::launch(BackwardCall call) const {
  launch_together(std::span(&call, 1));
}

void Backend::launch_together(std::span<const ForwardCall> calls) const {
  fused::run(calls, level(), pool_);
}

void Backend::launch_together(std::span<BackwardCall> calls) const {
  c10::SmallVector<at::DataPtr, 4> gs;
  for (BackwardCall& call : calls) {
    if (call.dx == nullptr && call.dlora_a == nullptr) continue;
    const auto& p = call.problem;
    const int64_t size = fused::rank_dtype(p) == fused::DType::kFloat32 ? 4 : 2;
    gs.push_back(c10::GetCPUAllocator()->allocate(static_cast<size_t>(p.rows * p.rank * size)));
    call.g = gs.back().get();
  }
  fused::run(calls, level(), pool_);
}

void Backend::launch(const fused::MixedForwardCall& call) const {
  fused::run(call, level(), pool_);
}

void Backend::launch(const fused::MixedBackwardCall& call) const {
  fused::run(call, level(), pool_);
}

}  // namespace fused_lora::cpu
