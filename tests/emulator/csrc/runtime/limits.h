// What a device and a kernel allow a launch to ask for, and how many blocks an SM holds.
#pragma once

#include <array>
#include <cstdint>

#include "runtime/machine.h"

namespace emulator {

constexpr int kMaxBlockDimension[3] = {1024, 1024, 64};
constexpr uint32_t kMaxGridDimension[3] = {0x7FFFFFFF, 65535, 65535};

struct KernelResources {
  int registers = 0;  // a thread's; 0: unknown, never a limit
  int64_t static_shared_bytes = 0;
  int64_t max_dynamic_shared_bytes = 0;
  std::array<int, 3> max_threads{0, 0, 0};       // .maxntid; zeros: not given
  std::array<int, 3> required_threads{0, 0, 0};  // .reqntid; zeros: not given
};

// Throws CudaError with the code that the real call returns:
// - cudaErrorInvalidConfiguration for a dimension of the grid or the block that is zero or that no
//   kernel may have, and for too many threads in a block (driver_types.h);
// - cudaErrorInvalidValue for more threads than the launch bounds allow, for other threads than
//   .reqntid demands, and for more dynamic shared memory than the kernel's limit: 48 KiB less its
//   static shared memory, unless it opted in. CUDA's documents do not name this code; it is what
//   users report of cuLaunchKernel;
// - cudaErrorLaunchOutOfResources where the registers do not suffice (driver_types.h);
// - cudaErrorNotSupported for a cluster of several blocks, which are not emulated.
void check_launch(const Limits& limits, const KernelResources& kernel, const LaunchShape& shape,
                  uint64_t dynamic_shared_bytes);

// The largest block that can be launched: cudaFuncAttributes::maxThreadsPerBlock.
int max_threads_per_block(const Limits& limits, const KernelResources& kernel);

// Blocks that an SM holds at a time, by the rule of the toolkit's cuda_occupancy.h for compute
// capability 8.0 and later, with all of the SM's shared memory available; 0: the kernel cannot be
// launched so.
int resident_blocks(const Limits& limits, const KernelResources& kernel, int threads,
                    uint64_t dynamic_shared_bytes);

}  // namespace emulator
