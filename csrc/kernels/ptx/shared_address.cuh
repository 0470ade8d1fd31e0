#pragma once

#include <cstdint>

namespace fused_lora::kernels::ptx {

// The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace fused_lora::kernels::ptx
