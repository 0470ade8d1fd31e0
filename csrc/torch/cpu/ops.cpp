// The ops on the CPU.
#include <torch/library.h>

#include "torch/cpu/backend.h"
#include "torch/cpu/packing.h"
#include "torch/run.h"
#include "torch/run_grouped.h"

namespace fused_lora {

TORCH_LIBRARY_IMPL(fused_lora, CPU, m) {
  m.impl("lora_linear_forward", &Ops<cpu::Backend>::forward);
  m.impl("lora_linear_backward", &Ops<cpu::Backend>::backward);
  m.impl("lora_linear_grouped_forward", &GroupedOps<cpu::Backend>::forward);
  m.impl("lora_linear_grouped_backward", &GroupedOps<cpu::Backend>::backward);
  m.impl("dropout_mask", &Ops<cpu::Backend>::dropout_mask);
  m.impl("pack_weight", &cpu::pack_weight);
  m.impl("unpack_weight", &cpu::unpack_weight);
}

}  // namespace fused_lora
