// Whether a call is to be followed by torch's transforms, which cannot look into an autograd
// Function of C++.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

namespace fused_lora {

// In torch.func.*, and where a batch of gradients goes through one backward. torch includes the key
// while there is a transform to apply, and takes it away around what the last one was applied to.
inline bool within_torch_func() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether anyone in the process differentiates in forward mode: what to ask before the tensors,
// each of which takes a lock.
inline bool within_forward_mode() {
  return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// In forward-mode differentiation.
inline bool has_tangent(const at::Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}

}  // namespace fused_lora
