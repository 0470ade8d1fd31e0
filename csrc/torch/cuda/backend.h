// The CUDA kernels as the ops see them (torch/run.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <functional>
#include <span>
#include <string>

#include "kernels/plan.h"
#include "torch/choice.h"
#include "torch/cuda/device.h"
#include "torch/cuda/mask.h"
#include "torch/cuda/operands.h"
#include "torch/cuda/stream.h"
#include "torch/cuda/timing.h"

namespace fused_lora::cuda {

class Backend {
 public:
  using ForwardCall = kernels::ForwardCall;
  using BackwardCall = kernels::BackwardCall;

  explicit Backend(const at::Tensor& on) : on_(on), stream_(current_stream(on.device())) {}

  static std::string obstacle(const at::Tensor& rows) {
    return has_kernels(rows.scalar_type()) ? "" : "there are no fused kernels for torch.float64";
  }
  static auto view(const at::Tensor& matrix) { return cuda::view(matrix); }
  static auto problem(const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& lora_a,
                      bool round_adapters) {
    return cuda::problem(rows, weight.size(0), weight.size(1), lora_a, round_adapters);
  }
  // Of lora_add (torch/any_base/run.h).
  static std::string add_obstacle(const at::Tensor& y, at::ScalarType dtype) {
    if (!has_kernels(dtype)) return "there are no fused kernels for torch.float64";
    return y.scalar_type() == dtype ? "" : "the kernels add to a tensor of x's dtype alone";
  }
  static auto add_problem(const at::Tensor& y, at::ScalarType /*dtype*/, const at::Tensor& lora_a,
                          bool round_adapters) {
    return cuda::problem(y, y.size(1), lora_a.size(1), lora_a, round_adapters);
  }
  static auto dropout(const composed::Dropout& dropout) { return cuda::dropout(dropout); }
  static at::Tensor mask(const at::Tensor& seed, int64_t rows, int64_t columns, double p,
                         int64_t row_offset, int64_t column_offset, at::ScalarType dtype) {
    return cuda::dropout_mask(seed, rows, columns, p, row_offset, column_offset, dtype);
  }

  static at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like, at::ScalarType dtype) {
    return at::empty(sizes, like.options().dtype(dtype));
  }
  static void complete(ShapeClass& /*shape*/) {}
  bool capturing() const { return is_capturing(stream_); }
  Times time(const std::function<void()>& fused, const std::function<void()>& composed) const {
    return time_in_turns(fused, composed, stream_);
  }

  template <typename Call>
  bool presumed_faster(const Call& call) const {
    return kernels::presumed_faster(plan(call));
  }

  template <typename Call>
  void launch(const Call& call) const {
    run(call, plan(call));
  }
  void launch_together(std::span<const ForwardCall> calls) const { run_group(calls); }
  void launch_together(std::span<const BackwardCall> calls) const { run_group(calls); }

 private:
  // The workspace goes back to torch's allocator at once: whatever gets that memory next is written
  // after the kernels, on the same stream.
  template <typename Calls, typename Plan>
  void run(const Calls& calls, const Plan& planned) const {
    const auto bytes = static_cast<int64_t>(planned.workspace_bytes);
    at::Tensor workspace;
    if (bytes > 0) workspace = at::empty({bytes}, on_.options().dtype(at::kByte));
    void* const memory = bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
    const cudaError_t error = kernels::run(calls, planned, memory, stream_);
    if (error != cudaSuccess) check(error, "a launch of " + kernels::describe(planned));
  }

  template <typename Call>
  void run_group(std::span<const Call> calls) const {
    const auto count = static_cast<int>(calls.size());
    run(calls.data(), kernels::plan(calls.data(), count, figures(on_.device())));
  }

  template <typename Call>
  auto plan(const Call& call) const {
    return kernels::plan(call, figures(on_.device()));
  }

  const at::Tensor& on_;
  cudaStream_t stream_;
};

}  // namespace fused_lora::cuda
