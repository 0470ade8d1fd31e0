// Asynchronous copies from global to shared memory, sm_80 and newer (PTX ISA, "Data Movement and
// Conversion Instructions: Non-bulk copy").
#pragma once

#include "kernels/ptx/shared_address.cuh"

namespace fused_lora::kernels::ptx {

// 16 bytes, past L1: an operand's tile is read once by a block, and shared memory is its cache.
// Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same where `inside` holds; else 16 bytes of zeros, and nothing is read.
__device__ __forceinline__ void cp_async_16_or_zeros(uint32_t shared, const void* global,
                                                     bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}

// 4 bytes, for rows that are no multiple of 16 bytes; they go through L1, the only way for so few.
__device__ __forceinline__ void cp_async_4_or_zeros(uint32_t shared, const void* global,
                                                    bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
               "r"(inside ? 4 : 0)
               : "memory");
}

// Ends a group of this thread's copies; an empty group counts too.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the kPending newest of this thread's groups are under way. Other threads'
// copies are seen after a barrier that follows.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fused_lora::kernels::ptx
