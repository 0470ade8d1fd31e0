#include "torch/autocast.h"

#include <torch/library.h>

#include "torch/any_base/ops.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;

// base stays what the frozen layer made of it.
template <c10::DeviceType kDevice>
Tensor autocast(const Tensor& base, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                double scaling, double dropout_p, const OptionalTensor& seed, bool round_adapters,
                int64_t column_offset) {
  const OutOfAutocast<kDevice> cast;
  const Tensor x_cast = cast.x(x);
  return ops::lora_add(base, x_cast, cast.adapter(lora_a), cast.adapter(lora_b), scaling, dropout_p,
                       seed, round_adapters || cast.is_half(x_cast), column_offset);
}

template <c10::DeviceType kDevice>
Tensor& autocast_(Tensor& base, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                  double scaling, double dropout_p, const OptionalTensor& seed, bool round_adapters,
                  int64_t column_offset) {
  const OutOfAutocast<kDevice> cast;
  const Tensor x_cast = cast.x(x);
  return ops::lora_add_(base, x_cast, cast.adapter(lora_a), cast.adapter(lora_b), scaling,
                        dropout_p, seed, round_adapters || cast.is_half(x_cast), column_offset);
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCPU, m) {
  m.impl("lora_add", &autocast<c10::DeviceType::CPU>);
  m.impl("lora_add_", &autocast_<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCUDA, m) {
  m.impl("lora_add", &autocast<c10::DeviceType::CUDA>);
  m.impl("lora_add_", &autocast_<c10::DeviceType::CUDA>);
}

}  // namespace fused_lora
