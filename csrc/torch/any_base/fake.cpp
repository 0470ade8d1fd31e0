// The ops without data (torch/fake.cpp).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "composed/composed.h"
#include "composed/shapes.h"
#include "torch/any_base/checks.h"
#include "torch/any_base/ops.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;

Tensor forward_(Tensor& base, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, double,
                double dropout_p, const OptionalTensor& seed, bool round_adapters,
                int64_t column_offset) {
  checks::add_forward_arguments(base, x, lora_a, lora_b, dropout_p, seed, column_offset);
  const auto low = composed::rank_dtype(x, lora_a, round_adapters);
  return at::empty_symint({composed::sym_rows(x), lora_a.sym_size(0)}, x.options().dtype(low));
}

std::tuple<Tensor, Tensor> forward(const Tensor& base, const Tensor& x, const Tensor& lora_a,
                                   const Tensor& lora_b, double scaling, double dropout_p,
                                   const OptionalTensor& seed, bool round_adapters,
                                   int64_t column_offset) {
  Tensor y = at::empty_symint(base.sym_sizes(), base.options());
  const Tensor h =
      forward_(y, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters, column_offset);
  return {y, h};
}

composed::AddGradients backward(const Tensor& dy, const OptionalTensor& x, const Tensor& lora_a,
                                const Tensor& lora_b, const OptionalTensor& h, at::ScalarType dtype,
                                double, double dropout_p, const OptionalTensor& seed,
                                bool round_adapters, std::array<bool, 3> needed,
                                int64_t column_offset) {
  checks::add_backward_arguments(dy, x, lora_a, lora_b, h, dtype, dropout_p, seed, round_adapters,
                                 needed, column_offset);
  const auto like = [](bool needed, const Tensor& t) {
    return needed ? at::empty_symint(t.sym_sizes(), t.options()) : Tensor();
  };
  c10::SymDimVector dx_sizes(dy.sym_sizes().begin(), dy.sym_sizes().end());
  dx_sizes.back() = lora_a.sym_size(1);
  return {needed[0] ? at::empty_symint(dx_sizes, dy.options().dtype(dtype)) : Tensor(),
          like(needed[1], lora_a), like(needed[2], lora_b)};
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, Meta, m) {
  m.impl("lora_add_forward", &forward);
  m.impl("lora_add_forward_", &forward_);
  m.impl("lora_add_backward", &backward);
}

}  // namespace fused_lora
