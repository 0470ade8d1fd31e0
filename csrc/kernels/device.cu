#include "kernels/lora_linear.h"

namespace fused_lora::kernels {
namespace {

// Whether this library has code for a device is asked of a kernel of it.
__global__ void probe() {}

struct Attribute {
  cudaDeviceAttr name;
  int* value;
};

}  // namespace

cudaError_t current_device(Device* device) {
  int ordinal = 0;
  if (const cudaError_t error = cudaGetDevice(&ordinal); error != cudaSuccess) return error;
  int major = 0, minor = 0;
  for (const auto& [name, value] :
       {Attribute{cudaDevAttrComputeCapabilityMajor, &major},
        Attribute{cudaDevAttrComputeCapabilityMinor, &minor},
        Attribute{cudaDevAttrMultiProcessorCount, &device->multiprocessors},
        Attribute{cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_memory_per_block}}) {
    const cudaError_t error = cudaDeviceGetAttribute(value, name, ordinal);
    if (error != cudaSuccess) return error;
  }
  device->compute_capability = 10 * major + minor;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe);
}

}  // namespace fused_lora::kernels
