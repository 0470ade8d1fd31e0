// The kernels in AVX-512 with BF16.
#include "cpu/fused/product.h"

#if defined(FUSED_LORA_X86_LEVELS)
#include <immintrin.h>

// GCC's own header sets undefined vectors from themselves.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

// Only what follows is compiled for the level: nothing that other files share.
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

#define FUSED_LORA_PAIRS 1
#include "cpu/fused/vector_avx512.h"
// The vector comes first.
#include "cpu/fused/level_kernels.h"

#pragma GCC pop_options

namespace fused_lora::cpu::fused {

const Kernels& kernels_avx512_bf16() {
  return kKernels;
}

}  // namespace fused_lora::cpu::fused
#endif
