#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "torch/cast_cache.h"
#include "torch/ops.h"
#include "torch/packed_weight.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;

// x, W and b go to the autocast dtype, as in torch's own linear. fp32 adapters do not: they are
// rounded inside the op, so that no cast of them is stored and their gradients come out in fp32.
template <c10::DeviceType kDevice>
Tensor autocast(const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                const OptionalTensor& bias, double scaling, double dropout_p,
                const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto eligible = [](const Tensor& t) {
    return at::autocast::is_eligible(t, kDevice) && t.scalar_type() != at::kDouble;
  };
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  const auto cast_weight = [&](const Tensor& t) {
    const bool frozen = eligible(t) && t.scalar_type() != dtype && !t.requires_grad() &&
                        at::autocast::is_autocast_cache_enabled();
    if (frozen) return cast_cache::cast(t, dtype);
    return is_packed(t) && t.scalar_type() != dtype ? cast(plain(t)) : cast(t);
  };
  const auto cast_adapter = [&](const Tensor& t) {
    return t.scalar_type() == at::kFloat ? t : cast(t);
  };

  const Tensor x_cast = cast(x);
  const bool half = x_cast.scalar_type() == at::kHalf || x_cast.scalar_type() == at::kBFloat16;
  return ops::lora_linear(x_cast, cast_weight(weight), cast_adapter(lora_a), cast_adapter(lora_b),
                          bias ? OptionalTensor(cast(*bias)) : std::nullopt, scaling, dropout_p,
                          seed, round_adapters || half, column_offset);
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCPU, m) {
  m.impl("lora_linear", &autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, AutocastCUDA, m) {
  m.impl("lora_linear", &autocast<c10::DeviceType::CUDA>);
}

}  // namespace fused_lora
