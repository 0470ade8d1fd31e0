// Tells which of a fat binary's images runs.
#include <cuda_runtime.h>

__global__ void architecture(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

extern "C" {

cudaError_t launch_architecture(int* out) {
  architecture<<<1, 1>>>(out);
  return cudaGetLastError();
}

const void* architecture_function() {
  return reinterpret_cast<const void*>(architecture);
}
}
