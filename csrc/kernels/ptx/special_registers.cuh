// Special registers, read anew by every call (PTX ISA, "Special Registers"). The compiler keeps
// what it derives from threadIdx and blockIdx in registers from the first use to the last, across a
// main loop that has none to spare; what derives from a volatile read it makes again.
#pragma once

namespace fused_lora::kernels::ptx {

__device__ __forceinline__ int thread_x() {
  int value;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(value));
  return value;
}

__device__ __forceinline__ int block_x() {
  int value;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(value));
  return value;
}

__device__ __forceinline__ int block_y() {
  int value;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(value));
  return value;
}

}  // namespace fused_lora::kernels::ptx
