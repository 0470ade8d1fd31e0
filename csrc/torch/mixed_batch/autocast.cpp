#include <torch/library.h>

#include "torch/autocast.h"
#include "torch/mixed_batch/ops.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

template <c10::DeviceType kDevice>
at::Tensor autocast(const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a,
                    at::TensorList lora_b, const at::Tensor& adapter_index,
                    const ops::OptionalTensor& bias, at::ArrayRef<double> scaling, double dropout_p,
                    const ops::OptionalTensor& seed, bool round_adapters) {
  const OutOfAutocast<kDevice> cast;
  const auto adapters = [&](at::TensorList all) {
    std::vector<at::Tensor> made;
    made.reserve(all.size());
    for (const at::Tensor& one : all) made.push_back(cast.adapter(one));
    return made;
  };
  const at::Tensor x_cast = cast.x(x);
  return ops::lora_linear_mixed(x_cast, cast.weight(weight), adapters(lora_a), adapters(lora_b),
                                adapter_index,
                                bias ? ops::OptionalTensor(cast.tensor(*bias)) : std::nullopt,
                                scaling, dropout_p, seed, round_adapters || cast.is_half(x_cast));
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCPU, m) {
  m.impl("lora_linear_mixed", &autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCUDA, m) {
  m.impl("lora_linear_mixed", &autocast<c10::DeviceType::CUDA>);
}

}  // namespace fused_lora
