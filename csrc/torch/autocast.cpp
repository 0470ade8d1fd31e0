#include "torch/autocast.h"

#include <torch/library.h>

#include "torch/ops.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;

template <c10::DeviceType kDevice>
Tensor autocast(const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                const OptionalTensor& bias, double scaling, double dropout_p,
                const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  const OutOfAutocast<kDevice> cast;
  const Tensor x_cast = cast.tensor(x);
  return ops::lora_linear(x_cast, cast.weight(weight), cast.adapter(lora_a), cast.adapter(lora_b),
                          bias ? OptionalTensor(cast.tensor(*bias)) : std::nullopt, scaling,
                          dropout_p, seed, round_adapters || cast.is_half(x_cast), column_offset);
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCPU, m) {
  m.impl("lora_linear", &autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCUDA, m) {
  m.impl("lora_linear", &autocast<c10::DeviceType::CUDA>);
}

}  // namespace fused_lora
