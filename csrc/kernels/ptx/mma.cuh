// Matrix multiply-accumulate of one warp, D = A·B + D with fp32 sums (PTX ISA, "Warp-level Matrix
// Multiply-Accumulate Instructions: mma"). With g = lane / 4 and t = lane % 4 a lane holds
//
//     D 16×8              d[0], d[1]: row g, columns 2t, 2t+1     d[2], d[3]: row g+8
//
//     16-bit   A 16×16    a[0]: row g, k 2t, 2t+1                 a[1]: row g+8
//                         a[2]: row g, k 2t+8, 2t+9               a[3]: row g+8
//              B 16×8     b0: k 2t, 2t+1 of column g              b1: k 2t+8, 2t+9
//
//     tf32     A 16×8     a[0]: row g, k t                        a[1]: row g+8
//                         a[2]: row g, k t+4                      a[3]: row g+8
//              B 8×8      b0: k t of column g                     b1: k t+4
#pragma once

#include <cstdint>

#include "kernels/element.h"

namespace fused_lora::kernels::ptx {

// m16n8k16. T: bf16 or fp16.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1);
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<fp16>(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// m16n8k8 in tf32. The operands' low 13 bits must be zero: see round_to_tf32.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// fp32 to tf32, to nearest, ties away from zero: 10 explicit bits of mantissa, fp32's exponent.
// bf16 and fp16 are exact in it.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

}  // namespace fused_lora::kernels::ptx
