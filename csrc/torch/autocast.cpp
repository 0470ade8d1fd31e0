#include "torch/autocast.h"

#include <torch/library.h>

#include "torch/ops.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;
using ops::OptionalTensors;

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

template <c10::DeviceType kDevice>
std::vector<Tensor> autocast_grouped(const Tensor& x, at::TensorList weights, at::TensorList lora_a,
                                     at::TensorList lora_b, const OptionalTensors& biases,
                                     at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
                                     const OptionalTensors& seeds, bool round_adapters) {
  const OutOfAutocast<kDevice> cast;
  const Tensor rows = cast.tensor(x);
  std::vector<Tensor> w, a, b;
  for (const Tensor& t : weights) w.push_back(cast.weight(t));
  for (const Tensor& t : lora_a) a.push_back(cast.adapter(t));
  for (const Tensor& t : lora_b) b.push_back(cast.adapter(t));
  OptionalTensors cast_biases;
  for (const OptionalTensor& t : biases)
    cast_biases.push_back(t ? OptionalTensor(cast.tensor(*t)) : std::nullopt);
  return ops::lora_linear_grouped(rows, w, a, b, cast_biases, scalings, dropout_p, seeds,
                                  round_adapters || cast.is_half(rows));
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCPU, m) {
  m.impl("lora_linear", &autocast<c10::DeviceType::CPU>);
  m.impl("lora_linear_grouped", &autocast_grouped<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCUDA, m) {
  m.impl("lora_linear", &autocast<c10::DeviceType::CUDA>);
  m.impl("lora_linear_grouped", &autocast_grouped<c10::DeviceType::CUDA>);
}

}  // namespace fused_lora
