// What calls under autocast have in common, in the autocast dtype. torch's autocast keeps casts of
// trainable leaves only, and only until the context ends: it casts a frozen weight again at every
// call, and the x of q, k and v for each of them.
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_lora::cast_cache {

// `weight`, plain or packed, in `dtype`: one copy, made once and kept until the weight changes (by
// torch's version counter or its storage) or dies. Writing through `weight.data` moves neither:
// call clear() after it.
at::Tensor cast(const at::Tensor& weight, at::ScalarType dtype);

// `x` in `dtype`, without a graph: while a cast of this very x, made by this thread's last call,
// lives in somebody's hands, another tensor of the same memory. For an x that `may_be_kept`.
at::Tensor shared_cast(const at::Tensor& x, at::ScalarType dtype);

// Fake, traced, batched and subclassed tensors have no storage to remember a copy by, inference
// tensors no version, and a negated view is not what its memory holds.
bool may_be_kept(const at::Tensor& t);

// Drops every copy of a weight.
void clear();

}  // namespace fused_lora::cast_cache
