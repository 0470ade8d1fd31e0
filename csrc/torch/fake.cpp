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

Tensor empty_y(const Tensor& x, const Tensor& weight) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = sym_out_features(weight);
  return at::empty_symint(sizes, x.options());
}

Tensor empty_h(const Tensor& x, const Tensor& lora_a, const c10::SymInt& ranks,
               bool round_adapters) {
  const auto low = composed::rank_dtype(x, lora_a, round_adapters);
  return at::empty_symint({composed::sym_rows(x), ranks}, x.options().dtype(low));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                   const Tensor& lora_b, const OptionalTensor& bias, double,
                                   double dropout_p, const OptionalTensor& seed,
                                   bool round_adapters, int64_t column_offset) {
  checks::forward_arguments(x, weight, lora_a, lora_b, bias, dropout_p, seed, column_offset);
  return {empty_y(x, weight), empty_h(x, lora_a, lora_a.sym_size(0), round_adapters)};
}

std::tuple<std::vector<Tensor>, Tensor> grouped_forward(
    const Tensor& x, at::TensorList weights, at::TensorList lora_a, at::TensorList lora_b,
    const ops::OptionalTensors& biases, at::ArrayRef<double> scalings,
    at::ArrayRef<double> dropout_p, const ops::OptionalTensors& seeds, bool round_adapters) {
  checks::grouped_forward_arguments(x, weights, lora_a, lora_b, biases, scalings, dropout_p, seeds);
  std::vector<Tensor> ys;
  for (const Tensor& weight : weights) ys.push_back(empty_y(x, weight));
  c10::SymInt ranks = 0;
  for (const Tensor& a : lora_a) ranks = ranks + a.sym_size(0);
  return {std::move(ys), empty_h(x, lora_a[0], ranks, round_adapters)};
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

std::vector<Tensor> grouped_backward(at::TensorList dy, const OptionalTensor& x,
                                     at::TensorList weights, at::TensorList lora_a,
                                     at::TensorList lora_b, const ops::OptionalTensors& h,
                                     at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
                                     const ops::OptionalTensors& seeds, bool round_adapters,
                                     const c10::List<bool>& needed) {
  checks::grouped_backward_arguments(dy, x, weights, lora_a, lora_b, h, scalings, dropout_p, seeds,
                                     round_adapters, needed);
  std::vector<Tensor> made;
  for (size_t i = 0; i < dy.size(); ++i) {
    const auto needs = [&](size_t k) -> bool { return needed[1 + 4 * i + k]; };
    const auto [dx, dweight, da, db, dbias] = backward(
        dy[i], x, weights[i], lora_a[i], lora_b[i], h.get(i), scalings[i], dropout_p[i],
        seeds.get(i), round_adapters, {i == 0 && needed[0], needs(0), needs(1), needs(2), needs(3)},
        /*column_offset=*/0);
    for (const Tensor& gradient : {dx, dweight, da, db, dbias}) {
      if (gradient.defined()) made.push_back(gradient);
    }
  }
  return made;
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
  m.impl("lora_linear_grouped_forward", &grouped_forward);
  m.impl("lora_linear_grouped_backward", &grouped_backward);
  m.impl("dropout_mask", &dropout_mask);
  m.impl("pack_weight", &pack_weight);
  m.impl("unpack_weight", &unpack_weight);
}

}  // namespace fused_lora
