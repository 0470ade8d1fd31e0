// Tells which of a fat binary's images runs.
#include <cuda_runtime.h>

__global__ void architecture(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

// More values in registers for the newer architecture, so that the counts tell the images apart.
__global__ void pressure(float* values) {
#ifdef __CUDA_ARCH__
  constexpr int kCount = __CUDA_ARCH__ >= 900 ? 64 : 16;
  float kept[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) kept[i] = values[i * blockDim.x + threadIdx.x];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i * blockDim.x + threadIdx.x] = kept[kCount - 1 - i] * kept[i / 2];
  }
#endif
}

extern "C" {

cudaError_t launch_architecture(int* out) {
  architecture<<<1, 1>>>(out);
  return cudaGetLastError();
}

const void* pressure_function() {
  return reinterpret_cast<const void*>(pressure);
}
}
