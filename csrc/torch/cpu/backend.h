// The CPU kernels as the ops see them (torch/run.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <span>
#include <string>

#include "composed/rows.h"
#include "cpu/fused/lora_linear.h"
#include "cpu/fused/mixed_batch.h"
#include "torch/choice.h"

namespace fused_lora::cpu {

// The kernels are presumed faster than torch's GEMMs, which decides where nothing was timed.
constexpr bool kPresumedFaster = true;

// A dtype that has kernels.
fused::DType kernel_dtype(at::ScalarType dtype);

// Torch's threads; one inside a parallel region of torch's.
fused::Parallel torchs_pool();

class Backend {
 public:
  using ForwardCall = fused::ForwardCall;
  using BackwardCall = fused::BackwardCall;

  explicit Backend(const at::Tensor& /*on*/) : pool_(torchs_pool()) {}

  static std::string obstacle(const at::Tensor& rows);
  // A matrix, or a packed weight, which has no strides.
  static fused::MatrixView view(const at::Tensor& tensor);
  static fused::Problem problem(const at::Tensor& rows, const at::Tensor& weight,
                                const at::Tensor& lora_a, bool round_adapters);
  // Of lora_add (torch/any_base/run.h).
  static std::string add_obstacle(const at::Tensor& y, at::ScalarType dtype);
  static fused::Problem add_problem(const at::Tensor& y, at::ScalarType dtype,
                                    const at::Tensor& lora_a, bool round_adapters);
  static fused::Dropout dropout(const composed::Dropout& dropout);
  static at::Tensor mask(const at::Tensor& seed, int64_t rows, int64_t columns, double p,
                         int64_t row_offset, int64_t column_offset, at::ScalarType dtype);

  static at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like, at::ScalarType dtype);
  void complete(ShapeClass& shape) const;
  static bool capturing() { return false; }
  static Times time(const std::function<void()>& fused, const std::function<void()>& composed);

  template <typename Call>
  static bool presumed_faster(const Call& /*call*/) {
    return kPresumedFaster;
  }

  void launch(const ForwardCall& call) const;
  void launch(BackwardCall call) const;
  void launch(const fused::MixedForwardCall& call) const;
  void launch(const fused::MixedBackwardCall& call) const;
  void launch_together(std::span<const ForwardCall> calls) const;
  void launch_together(std::span<BackwardCall> calls) const;

 private:
  fused::Parallel pool_;
};

}  // namespace fused_lora::cpu
