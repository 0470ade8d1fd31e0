// The operands of an op under autocast: x, W and b go to its dtype, as in torch's own linear. fp32
// adapters do not: they are rounded inside the op, so that no cast of them is stored and their
// gradients come out in fp32.
#pragma once

#include <ATen/autocast_mode.h>

#include "torch/cast_cache.h"
#include "torch/packed_weight.h"

namespace fused_lora {

// x in `dtype`, by memory that it shares with other casts of it that live; where it may.
bool may_share_cast(const at::Tensor& x);
at::Tensor shared_cast(const at::Tensor& x, at::ScalarType dtype);

// While it lives, calls of this thread are out of autocast.
template <c10::DeviceType kDevice>
class OutOfAutocast {
 public:
  OutOfAutocast()
      : guard_(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)),
        dtype_(at::autocast::get_autocast_dtype(kDevice)) {}

  at::Tensor tensor(const at::Tensor& t) const {
    return at::autocast::cached_cast(dtype_, t, kDevice);
  }

  at::Tensor x(const at::Tensor& t) const {
    const bool shares = is_eligible(t) && t.scalar_type() != dtype_ && may_share_cast(t);
    return shares ? shared_cast(t, dtype_) : tensor(t);
  }

  at::Tensor weight(const at::Tensor& t) const {
    const bool frozen = is_eligible(t) && t.scalar_type() != dtype_ && !t.requires_grad() &&
                        at::autocast::is_autocast_cache_enabled();
    if (frozen) return cast_cache::cast(t, dtype_);
    return is_packed(t) && t.scalar_type() != dtype_ ? tensor(plain(t)) : tensor(t);
  }

  at::Tensor adapter(const at::Tensor& t) const {
    return t.scalar_type() == at::kFloat ? t : tensor(t);
  }

  // Whether adapters beside an x that was cast are rounded.
  static bool is_half(const at::Tensor& x) {
    return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  }

 private:
  static bool is_eligible(const at::Tensor& t) {
    return at::autocast::is_eligible(t, kDevice) && t.scalar_type() != at::kDouble;
  }

  c10::impl::ExcludeDispatchKeyGuard guard_;
  at::ScalarType dtype_;
};

}  // namespace fused_lora
