// One call of an op on CUDA, which either path can compute.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>
#include <utility>

#include "kernels/plan.h"
#include "torch/cuda/choice.h"
#include "torch/cuda/device.h"
#include "torch/cuda/stream.h"
#include "torch/cuda/timing.h"

namespace fused_lora::cuda {

// Call: kernels::ForwardCall or BackwardCall. To be made under a guard for the device of `on`.
template <typename Call>
class Run : public Candidate {
 public:
  bool presumed_faster() override {
    allocate();
    return kernels::presumed_faster(plan());
  }

  bool capturing() override { return is_capturing(stream_); }

  std::optional<Times> time() override {
    try {
      return time_in_turns([this] { launch(); }, [this] { compose(); }, stream_);
    } catch (const c10::OutOfMemoryError&) {
      return std::nullopt;
    }
  }

 protected:
  explicit Run(const at::Tensor& on) : on_(on), stream_(current_stream(on.device())) {}
  ~Run() = default;

  virtual ShapeClass shape() const = 0;
  // Makes the outputs and names them in the call; more than once to no effect.
  virtual void allocate() = 0;
  // The other path, to be timed: the result is dropped.
  virtual void compose() = 0;

  // Runs the kernels. The workspace goes back to torch's allocator at once: whatever gets that
  // memory next is written after them, on the same stream.
  void launch() {
    allocate();
    const auto planned = plan();
    const auto bytes = static_cast<int64_t>(planned.workspace_bytes);
    at::Tensor workspace;
    if (bytes > 0) workspace = at::empty({bytes}, on_.options().dtype(at::kByte));
    void* const memory = bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
    const cudaError_t error = kernels::run(call_, planned, memory, stream_);
    if (error != cudaSuccess) check(error, "a launch of " + kernels::describe(planned));
  }

  // Whether the kernels are to compute the call, with what was asked for.
  bool takes_kernels(Path asked) {
    if (asked != Path::kAuto) return asked == Path::kFused;
    if (call_.problem.rows == 0) return false;
    const bool deterministic = at::globalContext().deterministicAlgorithms();
    return choose(shape(), deterministic, *this) == Path::kFused;
  }

  Call call_;
  const at::Tensor& on_;

 private:
  auto plan() const { return kernels::plan(call_, figures(on_.device())); }

  cudaStream_t stream_;
};

}  // namespace fused_lora::cuda
