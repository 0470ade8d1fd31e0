// The kernels in the instructions that every processor of the target has.
#include "cpu/fused/product.h"
#include "cpu/fused/vector_plain.h"
// The vector comes first.
#include "cpu/fused/level_kernels.h"

namespace fused_lora::cpu::fused {

const Kernels& kernels_plain() {
  return kKernels;
}

}  // namespace fused_lora::cpu::fused
