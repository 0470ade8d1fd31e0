// A frozen weight as the ops take it:
//
//     plain     out_features × in_features, of any strides
//     packed    out_features/32 × in_features/u × 32u, u = 1 in fp32 and 2 in bf16: the panels of
//               cpu/fused/weight_panels.h, on the CPU alone
//
// Works on symbolic sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/fused/weight_panels.h"
#include "torch/ops.h"

namespace fused_lora {

inline bool is_packed(const at::Tensor& weight) {
  return weight.dim() == 3;
}

inline bool has_panels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16;
}

// u: neighbours along K that lie together.
inline int64_t neighbours_in_panels(at::ScalarType dtype) {
  return dtype == at::kFloat ? 1 : 2;
}

inline c10::SymInt sym_out_features(const at::Tensor& weight) {
  return is_packed(weight) ? weight.sym_size(0) * cpu::fused::kPanelRows : weight.sym_size(0);
}

inline c10::SymInt sym_in_features(const at::Tensor& weight) {
  if (!is_packed(weight)) return weight.sym_size(1);
  return weight.sym_size(1) * neighbours_in_panels(weight.scalar_type());
}

inline int64_t out_features(const at::Tensor& weight) {
  return sym_out_features(weight).expect_int();
}

inline int64_t in_features(const at::Tensor& weight) {
  return sym_in_features(weight).expect_int();
}

// out_features × in_features: a copy of a packed weight, the weight itself where it is plain.
inline at::Tensor plain(const at::Tensor& weight) {
  return is_packed(weight) ? ops::unpack_weight(weight) : weight;
}

}  // namespace fused_lora
