// The kernels in AVX2 and FMA.
#include "cpu/fused/product.h"

#if defined(FUSED_LORA_X86_LEVELS)
#include <immintrin.h>

// Only what follows is compiled for the level: nothing that other files share.
#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "cpu/fused/vector_avx2.h"
// The vector comes first.
#include "cpu/fused/level_kernels.h"

#pragma GCC pop_options

namespace fused_lora::cpu::fused {

const Kernels& kernels_avx2() {
  return kKernels;
}

}  // namespace fused_lora::cpu::fused
#endif
