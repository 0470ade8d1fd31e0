// What callers ask of the device and of kernels.
#include <algorithm>
#include <climits>
#include <cstring>
#include <string>

#include "runtime/errors.h"
#include "runtime/launch_shape.h"
#include "runtime/limits.h"
#include "runtime/machine.h"
#include "runtime/registration.h"

namespace emulator {

namespace {

constexpr int kWarpSize = 32;
constexpr int kConstantBytes = 65536;
// The emulator does not model time: a rate of 1 GHz, in kHz, keeps what is computed from it finite.
constexpr int kClockRate = 1000000;

// There is one device.
void check_device(int device) {
  if (device != 0) throw CudaError(cudaErrorInvalidDevice, "device is " + std::to_string(device));
}

int clamp(int64_t value) {
  return static_cast<int>(std::min<int64_t>(value, INT_MAX));
}

// The attributes that launchers choose tiles, grids and paths by.
int device_attribute(const Limits& limits, cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return limits.major;
    case cudaDevAttrComputeCapabilityMinor:
      return limits.minor;
    case cudaDevAttrMultiProcessorCount:
      return limits.multiprocessors;
    case cudaDevAttrWarpSize:
      return kWarpSize;
    case cudaDevAttrMaxThreadsPerBlock:
      return limits.max_threads_per_block;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return limits.max_threads_per_multiprocessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return limits.max_blocks_per_multiprocessor;
    case cudaDevAttrMaxBlockDimX:
      return kMaxBlockDimension[0];
    case cudaDevAttrMaxBlockDimY:
      return kMaxBlockDimension[1];
    case cudaDevAttrMaxBlockDimZ:
      return kMaxBlockDimension[2];
    case cudaDevAttrMaxGridDimX:
      return clamp(kMaxGridDimension[0]);
    case cudaDevAttrMaxGridDimY:
      return clamp(kMaxGridDimension[1]);
    case cudaDevAttrMaxGridDimZ:
      return clamp(kMaxGridDimension[2]);
    case cudaDevAttrMaxRegistersPerBlock:
      return limits.registers_per_block;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return limits.registers_per_multiprocessor;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return clamp(limits.shared_per_block);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return clamp(limits.shared_per_block_optin);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return clamp(limits.shared_per_multiprocessor);
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return clamp(limits.shared_reserved_per_block);
    case cudaDevAttrTotalConstantMemory:
      return kConstantBytes;
    case cudaDevAttrL2CacheSize:
      return clamp(limits.l2_bytes);
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
      return kClockRate;
    case cudaDevAttrClusterLaunch:
      return limits.major >= 9;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrMemoryPoolsSupported:
      return 1;
    // Real devices have these; the emulator does not, and launchers must not build upon them.
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrIntegrated:
      return 0;
    default:
      throw ArgumentError("attr is " + std::to_string(attribute) + ", which is not emulated");
  }
}

cudaDeviceProp properties_of(const Limits& limits) {
  cudaDeviceProp properties{};
  limits.name.copy(properties.name, sizeof properties.name - 1);
  properties.major = limits.major;
  properties.minor = limits.minor;
  properties.multiProcessorCount = limits.multiprocessors;
  properties.warpSize = kWarpSize;
  properties.maxThreadsPerBlock = limits.max_threads_per_block;
  properties.maxThreadsPerMultiProcessor = limits.max_threads_per_multiprocessor;
  properties.maxBlocksPerMultiProcessor = limits.max_blocks_per_multiprocessor;
  for (int axis = 0; axis < 3; ++axis) {
    properties.maxThreadsDim[axis] = kMaxBlockDimension[axis];
    properties.maxGridSize[axis] = clamp(kMaxGridDimension[axis]);
  }
  properties.regsPerBlock = limits.registers_per_block;
  properties.regsPerMultiprocessor = limits.registers_per_multiprocessor;
  properties.sharedMemPerBlock = static_cast<size_t>(limits.shared_per_block);
  properties.sharedMemPerBlockOptin = static_cast<size_t>(limits.shared_per_block_optin);
  properties.sharedMemPerMultiprocessor = static_cast<size_t>(limits.shared_per_multiprocessor);
  properties.reservedSharedMemPerBlock = static_cast<size_t>(limits.shared_reserved_per_block);
  properties.totalConstMem = kConstantBytes;
  properties.totalGlobalMem = static_cast<size_t>(limits.memory_bytes);
  properties.l2CacheSize = clamp(limits.l2_bytes);
  properties.concurrentKernels = 1;
  properties.unifiedAddressing = 1;
  properties.streamPrioritiesSupported = 1;
  properties.memoryPoolsSupported = 1;
  properties.clusterLaunch = limits.major >= 9;
  return properties;
}

// The kernel's constants are not known from PTX, and its cluster may have any shape: both stay
// zero.
cudaFuncAttributes attributes_of(const Kernel& kernel) {
  const Limits& limits = Machine::instance().limits;
  const KernelResources resources = kernel.resources();
  cudaFuncAttributes attributes{};
  attributes.sharedSizeBytes = static_cast<size_t>(resources.static_shared_bytes);
  attributes.localSizeBytes = kernel.program().local_bytes;
  attributes.maxThreadsPerBlock = max_threads_per_block(limits, resources);
  attributes.numRegs = resources.registers;
  attributes.ptxVersion = kernel.module->ptx_architecture();
  attributes.binaryVersion = 10 * limits.major + limits.minor;
  attributes.maxDynamicSharedSizeBytes = static_cast<int>(resources.max_dynamic_shared_bytes);
  attributes.preferredShmemCarveout = kernel.shared_memory_carveout;
  return attributes;
}

void set_attribute(Kernel& kernel, cudaFuncAttribute attribute, int value) {
  const std::string given = "value is " + std::to_string(value);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize: {
      const int64_t most = Machine::instance().limits.shared_per_block_optin -
                           kernel.resources().static_shared_bytes;
      if (value < 0 || value > most) {
        throw ArgumentError(given + ", the device allows " + std::to_string(most) +
                            " bytes of dynamic shared memory");
      }
      kernel.max_dynamic_shared_bytes = value;
      break;
    }
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      if (value < cudaSharedmemCarveoutDefault || value > cudaSharedmemCarveoutMaxShared) {
        throw ArgumentError(given + ", a carveout is -1 to 100 percent");
      }
      kernel.shared_memory_carveout = value;
      break;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (value != 0 && value != 1) throw ArgumentError(given);
      break;
    default:
      throw ArgumentError("attr is " + std::to_string(attribute) + ", which is not emulated");
  }
}

int occupancy_of(const Kernel& kernel, int block_threads, size_t dynamic_shared_bytes) {
  if (block_threads <= 0) {
    throw ArgumentError("blockSize is " + std::to_string(block_threads));
  }
  return resident_blocks(Machine::instance().limits, kernel.resources(), block_threads,
                         dynamic_shared_bytes);
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

// ---- the device
// -----------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  return run_call("cudaGetDeviceCount", [&] {
    require(count, "count");
    *count = 1;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return run_call("cudaGetDevice", [&] {
    require(device, "device");
    *device = 0;
  });
}

cudaError_t cudaSetDevice(int device) {
  return run_call("cudaSetDevice", [&] { check_device(device); });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return run_call("cudaDeviceGetAttribute", [&] {
    require(value, "value");
    check_device(device);
    *value = device_attribute(Machine::instance().limits, attribute);
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return run_call("cudaGetDeviceProperties", [&] {
    require(properties, "prop");
    check_device(device);
    *properties = properties_of(Machine::instance().limits);
  });
}

// ---- kernels
// --------------------------------------------------------------------------------------

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  return run_call("cudaFuncGetAttributes", [&] {
    require(attributes, "attr");
    *attributes = attributes_of(find_kernel(function));
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return run_call("cudaFuncSetAttribute",
                  [&] { set_attribute(find_kernel(function), attribute, value); });
}

// A hint, and caches are not modelled.
cudaError_t cudaFuncSetCacheConfig(const void* function, cudaFuncCache /*preference*/) {
  return run_call("cudaFuncSetCacheConfig", [&] { find_kernel(function); });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int block_threads,
                                                          size_t dynamic_shared_bytes) {
  return run_call("cudaOccupancyMaxActiveBlocksPerMultiprocessor", [&] {
    require(blocks, "numBlocks");
    *blocks = occupancy_of(find_kernel(function), block_threads, dynamic_shared_bytes);
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int block_threads,
                                                                   size_t dynamic_shared_bytes,
                                                                   unsigned flags) {
  return run_call("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", [&] {
    require(blocks, "numBlocks");
    if (flags != cudaOccupancyDefault && flags != cudaOccupancyDisableCachingOverride) {
      throw ArgumentError("flags is " + std::to_string(flags));
    }
    *blocks = occupancy_of(find_kernel(function), block_threads, dynamic_shared_bytes);
  });
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  return run_call("cudaOccupancyMaxActiveClusters", [&] {
    require(clusters, "numClusters");
    require(config, "launchConfig");
    const Limits& limits = Machine::instance().limits;
    const KernelResources resources = find_kernel(function).resources();
    const LaunchShape shape = shape_of(*config);
    check_launch(limits, resources, shape, config->dynamicSmemBytes);
    const auto threads = static_cast<int>(shape.block[0] * shape.block[1] * shape.block[2]);
    *clusters = limits.multiprocessors *
                resident_blocks(limits, resources, threads, config->dynamicSmemBytes);
  });
}
}
