#include <torch/library.h>

#include "torch/any_base/ops.h"
#include "torch/find_op.h"
#include "torch/registration.h"

// The adapter of a frozen layer that computes by itself: adds s · drop(x) Aᵀ Bᵀ to `base`, which is
// what that layer gave for x. base may be of another dtype than x, and the sum has it. The other
// arguments are lora_linear's (torch/schema.cpp).
//
// Backward gives no gradient of base: that is dy. `dtype` is x's, which need not be given.
FUSED_LORA_DEFINE_FRAGMENT(FUSED_LORA_LIBRARY, m) {
  m.def(
      "lora_add(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, *, float scaling=1.0, float "
      "dropout_p=0.0, Tensor? seed=None, bool round_adapters=False, int column_offset=0) -> "
      "Tensor");
  m.def(
      "lora_add_(Tensor(a!) base, Tensor x, Tensor lora_a, Tensor lora_b, *, float scaling=1.0, "
      "float dropout_p=0.0, Tensor? seed=None, bool round_adapters=False, int column_offset=0) -> "
      "Tensor(a!)");
  m.def(
      "lora_add_forward(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, float "
      "dropout_p, Tensor? seed, bool round_adapters, int column_offset=0) -> (Tensor y, Tensor h)");
  m.def(
      "lora_add_forward_(Tensor(a!) base, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, "
      "float dropout_p, Tensor? seed, bool round_adapters, int column_offset=0) -> Tensor");
  m.def(
      "lora_add_backward(Tensor dy, Tensor? x, Tensor lora_a, Tensor lora_b, Tensor? h, ScalarType "
      "dtype, float scaling, float dropout_p, Tensor? seed, bool round_adapters, bool[3] needed, "
      "int column_offset=0) -> (Tensor dx, Tensor dlora_a, Tensor dlora_b)");
}

namespace fused_lora::ops {

at::Tensor lora_add(const at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                    const at::Tensor& lora_b, double scaling, double dropout_p,
                    const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  static const auto op = find<decltype(lora_add)>("lora_add");
  return op.call(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters, column_offset);
}

at::Tensor& lora_add_(at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                      const at::Tensor& lora_b, double scaling, double dropout_p,
                      const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  static const auto op = find<decltype(lora_add_)>("lora_add_");
  return op.call(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters, column_offset);
}

std::tuple<at::Tensor, at::Tensor> lora_add_forward(const at::Tensor& base, const at::Tensor& x,
                                                    const at::Tensor& lora_a,
                                                    const at::Tensor& lora_b, double scaling,
                                                    double dropout_p, const OptionalTensor& seed,
                                                    bool round_adapters, int64_t column_offset) {
  static const auto op = find<decltype(lora_add_forward)>("lora_add_forward");
  return op.call(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters, column_offset);
}

at::Tensor lora_add_forward_(at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                             const at::Tensor& lora_b, double scaling, double dropout_p,
                             const OptionalTensor& seed, bool round_adapters,
                             int64_t column_offset) {
  static const auto op = find<decltype(lora_add_forward_)>("lora_add_forward_");
  return op.call(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters, column_offset);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_add_backward(
    const at::Tensor& dy, const OptionalTensor& x, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const OptionalTensor& h, at::ScalarType dtype, double scaling,
    double dropout_p, const OptionalTensor& seed, bool round_adapters, std::array<bool, 3> needed,
    int64_t column_offset) {
  static const auto op = find<decltype(lora_add_backward)>("lora_add_backward");
  return op.call(dy, x, lora_a, lora_b, h, dtype, scaling, dropout_p, seed, round_adapters, needed,
                 column_offset);
}

}  // namespace fused_lora::ops
