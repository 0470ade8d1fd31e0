// The ops without data: shapes, dtypes and errors, for meta and fake tensors.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "composed/composed.h"
#include "torch/checks.h"
#include "torch/mixed_batch/ops.h"
#include "torch/packed_weight.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, at::TensorList lora_a,
                                   at::TensorList lora_b, const Tensor& adapter_index,
                                   const OptionalTensor& bias, at::ArrayRef<double> scaling,
                                   double dropout_p, const OptionalTensor& seed,
                                   bool round_adapters) {
  checks::mixed_forward_arguments(x, weight, lora_a, lora_b, adapter_index, bias, scaling,
                                  dropout_p, seed);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  c10::SymInt rows = 1, ranks = 0;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) rows = rows * sizes[d];
  for (const Tensor& a : lora_a) ranks = ranks + a.sym_size(0);
  sizes.back() = sym_out_features(weight);
  const auto low = composed::rank_dtype(x, lora_a[0], round_adapters);
  return {at::empty_symint(sizes, x.options()),
          at::empty_symint({rows, ranks}, x.options().dtype(low))};
}

ops::MixedGradients backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight,
                             at::TensorList lora_a, at::TensorList lora_b,
                             const Tensor& adapter_index, const OptionalTensor& h,
                             at::ArrayRef<double> scaling, double dropout_p,
                             const OptionalTensor& seed, bool round_adapters,
                             std::array<bool, 3> needed, c10::List<bool> needed_a,
                             c10::List<bool> needed_b) {
  checks::mixed_backward_arguments(dy, x, weight, lora_a, lora_b, adapter_index, h, scaling,
                                   dropout_p, seed, round_adapters, needed[1], needed_a, needed_b);
  const auto like = [](at::TensorList all, const c10::List<bool>& wanted) {
    std::vector<Tensor> made;
    for (size_t i = 0; i < all.size(); ++i) {
      made.push_back(wanted[i] ? at::empty_symint(all[i].sym_sizes(), all[i].options())
                               : at::empty({0}, all[i].options()));
    }
    return made;
  };
  c10::SymDimVector dx_sizes(dy.sym_sizes().begin(), dy.sym_sizes().end());
  dx_sizes.back() = sym_in_features(weight);
  return {needed[0] ? at::empty_symint(dx_sizes, dy.options()) : Tensor(),
          needed[1] ? at::empty_symint(weight.sym_sizes(), weight.options()) : Tensor(),
          needed[2] ? at::empty_symint({sym_out_features(weight)}, dy.options()) : Tensor(),
          like(lora_a, needed_a), like(lora_b, needed_b)};
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, Meta, m) {
  m.impl("lora_linear_mixed_forward", &forward);
  m.impl("lora_linear_mixed_backward", &backward);
}

}  // namespace fused_lora
