// The ops on the CPU: check, then compute.
#include <torch/library.h>

#include "composed/composed.h"
#include "cpu/dropout_mask.h"
#include "torch/checks.h"
#include "torch/ops.h"
#include "torch/path.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;

void refuse_fused() {
  TORCH_CHECK(asked_path() != Path::kFused,
              "lora_linear: path 'fused' was asked for, but there are no fused kernels for cpu "
              "tensors");
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                   const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                                   double dropout_p, const OptionalTensor& seed,
                                   bool round_adapters) {
  checks::forward_arguments(x, weight, lora_a, lora_b, bias, dropout_p, seed);
  refuse_fused();
  return composed::forward(x, weight, lora_a, lora_b, bias, scaling,
                           composed::Dropout(dropout_p, seed, cpu::dropout_mask), round_adapters);
}

composed::Gradients backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight,
                             const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& h,
                             double scaling, double dropout_p, const OptionalTensor& seed,
                             bool round_adapters, std::array<bool, 5> needed) {
  checks::backward_arguments(dy, x, weight, lora_a, lora_b, h, dropout_p, seed, round_adapters,
                             needed);
  refuse_fused();
  return composed::backward(dy, x, weight, lora_a, lora_b, h, scaling,
                            composed::Dropout(dropout_p, seed, cpu::dropout_mask), round_adapters,
                            needed);
}

Tensor dropout_mask(const Tensor& seed, int64_t rows, int64_t columns, double p, int64_t row_offset,
                    int64_t column_offset, at::ScalarType dtype) {
  checks::mask_arguments(seed, rows, columns, p, row_offset, column_offset);
  return cpu::dropout_mask(seed, rows, columns, p, row_offset, column_offset, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_lora, CPU, m) {
  m.impl("lora_linear_forward", &forward);
  m.impl("lora_linear_backward", &backward);
  m.impl("dropout_mask", &dropout_mask);
}

}  // namespace fused_lora
