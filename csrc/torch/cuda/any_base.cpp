// The adapter of a frozen layer that computes by itself, on CUDA.
#include <torch/library.h>

#include "torch/any_base/run.h"
#include "torch/cuda/backend.h"
#include "torch/registration.h"

namespace fused_lora {

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, FUSED_LORA_CUDA_KEY, m) {
  m.impl("lora_add_forward", &AddOps<cuda::Backend>::forward);
  m.impl("lora_add_forward_", &AddOps<cuda::Backend>::forward_);
  m.impl("lora_add_backward", &AddOps<cuda::Backend>::backward);
}

}  // namespace fused_lora
