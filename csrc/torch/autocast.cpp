#include "torch/autocast.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "torch/ops.h"
#include "torch/registration.h"
#include "torch/transforms.h"

namespace fused_lora {
namespace {

// x.to(dtype), forward and backward, in memory that the layers which read one x share: what each
// saves for backward is then kept once.
struct SharedCast : torch::autograd::Function<SharedCast> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            at::ScalarType dtype) {
    ctx->saved_data["dtype"] = static_cast<int64_t>(x.scalar_type());
    return cast_cache::shared_cast(x, dtype);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    return {grads[0].to(dtype), at::Tensor()};
  }
};

}  // namespace

bool may_share_cast(const at::Tensor& x) {
  return cast_cache::may_be_kept(x) && !within_torch_func() && !has_tangent(x);
}

at::Tensor shared_cast(const at::Tensor& x, at::ScalarType dtype) {
  return SharedCast::apply(x, dtype);
}

namespace {

using at::Tensor;
using ops::OptionalTensor;
using ops::OptionalTensors;

template <c10::DeviceType kDevice>
Tensor autocast(const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                const OptionalTensor& bias, double scaling, double dropout_p,
                const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  const OutOfAutocast<kDevice> cast;
  const Tensor x_cast = cast.x(x);
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
  const Tensor rows = cast.x(x);
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
