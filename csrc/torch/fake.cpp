// The ops without data: shapes, dtypes and errors, for meta and fake tensors.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "composed/composed.h"
#include "composed/shapes.h"
#include "torch/checks.h"
#include "torch/ops.h"
#include "torch/packed_weight.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                   const Tensor& lora_b, const OptionalTensor& bias, double,
                                   double dropout_p, const OptionalTensor& seed,
                                   bool round_adapters, int64_t column_offset) {
  checks::forward_arguments(x, weight, lora_a, lora_b, bias, dropout_p, seed, column_offset);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = sym_out_features(weight);
  const auto low = composed::rank_dtype(x, lora_a, round_adapters);
  return {at::empty_symint(sizes, x.options()),
          at::empty_symint({composed::sym_rows(x), lora_a.sym_size(0)}, x.options().dtype(low))};
}

composed::Gradients backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight,
                             const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& h,
                             double, double dropout_p, const OptionalTensor& seed,
                             bool round_adapters, std::array<bool, 5> needed,
                             int64_t column_offset) {
  checks::backward_arguments(dy, x, weight, lora_a, lora_b, h, dropout_p, seed, round_adapters,
                             needed, column_offset);
  const auto like = [](bool needed, const Tensor& t) {
    return needed ? at::empty_symint(t.sym_sizes(), t.options()) : Tensor();
  };
  c10::SymDimVector dx_sizes(dy.sym_sizes().begin(), dy.sym_sizes().end());
  dx_sizes.back() = sym_in_features(weight);
  return {needed[0] ? at::empty_symint(dx_sizes, dy.options()) : Tensor(), like(needed[1], weight),
          like(needed[2], lora_a), like(needed[3], lora_b),
          needed[4] ? at::empty_symint({sym_out_features(weight)}, dy.options()) : Tensor()};
}

// The sizes come by value: the dispatcher knows no other signature for them.
Tensor dropout_mask(const Tensor& seed, c10::SymInt rows, c10::SymInt columns, double p,
                    c10::SymInt row_offset, c10::SymInt column_offset, at::ScalarType dtype) {
  checks::mask_arguments(seed, rows, columns, p, row_offset, column_offset);
  return at::empty_symint({rows, columns}, seed.options().dtype(dtype));
}

Tensor pack_weight(const Tensor& weight) {
  checks::pack_arguments(weight);
  const int64_t together = neighbours_in_panels(weight.scalar_type());
  return at::empty_symint(
      {weight.sym_size(0) / cpu::fused::kPanelRows, weight.sym_size(1) / together,
       c10::SymInt(cpu::fused::kPanelRows * together)},
      weight.options());
}

Tensor unpack_weight(const Tensor& packed) {
  checks::packed_weight("unpack_weight", packed);
  return at::empty_symint({sym_out_features(packed), sym_in_features(packed)}, packed.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, Meta, m) {
  m.impl("lora_linear_forward", &forward);
  m.impl("lora_linear_backward", &backward);
  m.impl("dropout_mask", &dropout_mask);
  m.impl("pack_weight", &pack_weight);
  m.impl("unpack_weight", &unpack_weight);
}

}  // namespace fused_lora
