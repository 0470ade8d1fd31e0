#include <torch/library.h>

#include "torch/find_op.h"
#include "torch/mixed_batch/ops.h"
#include "torch/registration.h"

// lora_linear (torch/schema.cpp) for rows of different adapters. adapter_index: int64, of x's first
// dimensions; for each of their elements its place in lora_a, lora_b and scaling, or negative for
// none. The adapters may differ in rank, and have one dtype. h has their ranks side by side.
// Backward gives a gradient of every adapter, without elements where it is not needed.
FUSED_LORA_DEFINE_FRAGMENT(FUSED_LORA_LIBRARY, m) {
  m.def(
      "lora_linear_mixed(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor "
      "adapter_index, Tensor? bias=None, *, float[] scaling, float dropout_p=0.0, Tensor? "
      "seed=None, bool round_adapters=False) -> Tensor");
  m.def(
      "lora_linear_mixed_forward(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor "
      "adapter_index, Tensor? bias, float[] scaling, float dropout_p, Tensor? seed, bool "
      "round_adapters) -> (Tensor y, Tensor h)");
  m.def(
      "lora_linear_mixed_backward(Tensor dy, Tensor? x, Tensor weight, Tensor[] lora_a, Tensor[] "
      "lora_b, Tensor adapter_index, Tensor? h, float[] scaling, float dropout_p, Tensor? seed, "
      "bool round_adapters, bool[3] needed, bool[] needed_a, bool[] needed_b) -> (Tensor dx, "
      "Tensor dweight, Tensor dbias, Tensor[] dlora_a, Tensor[] dlora_b)");
}

namespace fused_lora::ops {

at::Tensor lora_linear_mixed(const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a,
                             at::TensorList lora_b, const at::Tensor& adapter_index,
                             const OptionalTensor& bias, at::ArrayRef<double> scaling,
                             double dropout_p, const OptionalTensor& seed, bool round_adapters) {
  static const auto op = find<decltype(lora_linear_mixed)>("lora_linear_mixed");
  return op.call(x, weight, lora_a, lora_b, adapter_index, bias, scaling, dropout_p, seed,
                 round_adapters);
}

std::tuple<at::Tensor, at::Tensor> lora_linear_mixed_forward(
    const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a, at::TensorList lora_b,
    const at::Tensor& adapter_index, const OptionalTensor& bias, at::ArrayRef<double> scaling,
    double dropout_p, const OptionalTensor& seed, bool round_adapters) {
  static const auto op = find<decltype(lora_linear_mixed_forward)>("lora_linear_mixed_forward");
  return op.call(x, weight, lora_a, lora_b, adapter_index, bias, scaling, dropout_p, seed,
                 round_adapters);
}

MixedGradients lora_linear_mixed_backward(const at::Tensor& dy, const OptionalTensor& x,
                                          const at::Tensor& weight, at::TensorList lora_a,
                                          at::TensorList lora_b, const at::Tensor& adapter_index,
                                          const OptionalTensor& h, at::ArrayRef<double> scaling,
                                          double dropout_p, const OptionalTensor& seed,
                                          bool round_adapters, std::array<bool, 3> needed,
                                          c10::List<bool> needed_a, c10::List<bool> needed_b) {
  static const auto op = find<decltype(lora_linear_mixed_backward)>("lora_linear_mixed_backward");
  return op.call(dy, x, weight, lora_a, lora_b, adapter_index, h, scaling, dropout_p, seed,
                 round_adapters, needed, std::move(needed_a), std::move(needed_b));
}

}  // namespace fused_lora::ops
