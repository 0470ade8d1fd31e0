// The adapter of a frozen layer that computes by itself, on the CPU.
#include <torch/library.h>

#include "torch/any_base/run.h"
#include "torch/cpu/backend.h"

namespace fused_lora {

TORCH_LIBRARY_IMPL(fused_lora, CPU, m) {
  m.impl("lora_add_forward", &AddOps<cpu::Backend>::forward);
  m.impl("lora_add_forward_", &AddOps<cpu::Backend>::forward_);
  m.impl("lora_add_backward", &AddOps<cpu::Backend>::backward);
}

}  // namespace fused_lora
