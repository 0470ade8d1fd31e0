// Stores of neighbours to global memory in one access (PTX ISA, "Data Movement and Conversion
// Instructions: st"). The compiler takes apart assignments of vector types whose parts it has
// computed one by one, and does not always put them together again.
#pragma once

#include <cstdint>

namespace fused_lora::kernels::ptx {

// to: a multiple of 8.
__device__ __forceinline__ void store_global_64(void* to, uint32_t low, uint32_t high) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(low), "r"(high) : "memory");
}

// to: a multiple of 16.
__device__ __forceinline__ void store_global_128(void* to, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

}  // namespace fused_lora::kernels::ptx
