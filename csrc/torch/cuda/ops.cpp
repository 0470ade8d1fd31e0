// The ops on CUDA.
#include <torch/library.h>

#include "torch/cuda/backend.h"
#include "torch/registration.h"
#include "torch/run.h"
#include "torch/run_grouped.h"

namespace fused_lora {

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, FUSED_LORA_CUDA_KEY, m) {
  m.impl("lora_linear_forward", &Ops<cuda::Backend>::forward);
  m.impl("lora_linear_backward", &Ops<cuda::Backend>::backward);
  m.impl("lora_linear_grouped_forward", &GroupedOps<cuda::Backend>::forward);
  m.impl("lora_linear_grouped_backward", &GroupedOps<cuda::Backend>::backward);
  m.impl("dropout_mask", &Ops<cuda::Backend>::dropout_mask);
}

}  // namespace fused_lora
