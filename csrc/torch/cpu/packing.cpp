#include "torch/cpu/packing.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "cpu/fused/weight_panels.h"
#include "torch/checks.h"
#include "torch/cpu/backend.h"
#include "torch/packed_weight.h"

namespace fused_lora::cpu {
namespace {

// As a new thread would find things: what is made within is a plain tensor without a graph,
// whatever mode, transform or tracing the caller is in.
struct OutsideOfModes {
  const c10::impl::ForceDispatchKeyGuard keys{c10::default_included_set, c10::default_excluded_set};
  const c10::InferenceMode no_inference{false};
  const at::NoGradGuard no_grad;
};

}  // namespace

at::Tensor pack_weight(const at::Tensor& weight) {
  checks::pack_arguments(weight);
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  const auto dtype = weight.scalar_type();
  const int64_t together = neighbours_in_panels(dtype);
  at::Tensor packed = at::empty(
      {out_features / fused::kPanelRows, in_features / together, fused::kPanelRows * together},
      weight.options());
  fused::pack_weight(Backend::view(weight), out_features, in_features, kernel_dtype(dtype),
                     packed.mutable_data_ptr(), torchs_pool());
  return packed;
}

at::Tensor unpack_weight(const at::Tensor& packed) {
  checks::packed_weight("unpack_weight", packed);
  const int64_t n = out_features(packed), k = in_features(packed);
  at::Tensor weight = at::empty({n, k}, packed.options());
  fused::unpack_weight(packed.const_data_ptr(), n, k, kernel_dtype(packed.scalar_type()),
                       weight.mutable_data_ptr(), torchs_pool());
  return weight;
}

at::Tensor pack_parameter(const at::Tensor& parameter, bool transposed) {
  const OutsideOfModes outside;
  return pack_weight((transposed ? parameter.t() : parameter).resolve_neg());
}

void empty(const at::Tensor& parameter) {
  const OutsideOfModes outside;
  parameter.set_data(at::empty({0}, parameter.options()));
}

void restore(const at::Tensor& parameter, const at::Tensor& packed, at::IntArrayRef strides,
             bool transposed) {
  const OutsideOfModes outside;
  const at::Tensor dense = unpack_weight(packed);
  const at::Tensor weight = transposed ? dense.t() : dense;
  if (weight.strides().equals(strides)) {
    parameter.set_data(weight);
    return;
  }
  at::Tensor strided = at::empty_strided(weight.sizes(), strides, weight.options());
  parameter.set_data(strided.copy_(weight));
}

}  // namespace fused_lora::cpu
