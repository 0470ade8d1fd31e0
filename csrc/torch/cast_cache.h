// Frozen weights in the autocast dtype. torch's autocast keeps casts of trainable leaves only, and
// only until the context ends, so a frozen weight would be cast again at every call.
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_lora::cast_cache {

// `weight`, plain or packed, in `dtype`: one copy, made once and kept until the weight changes (by
// torch's version counter or its storage) or dies. Writing through `weight.data` moves neither:
// call clear() after it.
at::Tensor cast(const at::Tensor& weight, at::ScalarType dtype);

// Drops every copy.
void clear();

}  // namespace fused_lora::cast_cache
