// Loads of 8×8 matrices of 16-bit elements from shared memory into mma fragments (PTX ISA,
// "Warp-level Matrix Load Instruction: ldmatrix"). A matrix's row is 16 contiguous bytes at a
// multiple of 16.
#pragma once

#include <cstdint>

namespace fused_lora::kernels::ptx {

// Four matrices; lane l gives the address of row l % 8 of matrix l / 8. Register i of lane l holds
// elements 2·(l%4) and 2·(l%4)+1 of row l/4 of matrix i. As for 32-bit elements, a row holds four,
// and register i is element l%4 of row l/4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// The same, each matrix transposed: register i of lane l holds elements l/4 of rows 2·(l%4) and
// 2·(l%4)+1 of matrix i. For 16-bit elements alone.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

}  // namespace fused_lora::kernels::ptx
