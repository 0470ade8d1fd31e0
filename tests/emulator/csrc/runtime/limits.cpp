#include "runtime/limits.h"

#include <algorithm>
#include <string>

#include "runtime/errors.h"

namespace emulator {

namespace {

constexpr int kWarp = 32;
// An SM has four partitions, each with a quarter of the registers; warps are dealt out evenly.
constexpr int kPartitions = 4;
constexpr int kRegisterUnit = 256;  // registers are given to a warp in units of this many
constexpr int64_t kSharedUnit = 128;

int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

int64_t warp_registers(const KernelResources& kernel) {
  return round_up(int64_t{kernel.registers} * kWarp, kRegisterUnit);
}

bool registers_suffice(const Limits& limits, const KernelResources& kernel, int64_t threads) {
  const int64_t warps = round_up((threads + kWarp - 1) / kWarp, kPartitions);
  return warp_registers(kernel) * warps <= limits.registers_per_block;
}

// Zero where .maxntid is not given. Its three extents only bound the block's volume (PTX ISA,
// ".maxntid").
int launch_bound(const KernelResources& kernel) {
  return kernel.max_threads[0] * kernel.max_threads[1] * kernel.max_threads[2];
}

std::string shape_text(const uint32_t (&shape)[3]) {
  return "(" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + ", " +
         std::to_string(shape[2]) + ")";
}

}  // namespace

void check_launch(const Limits& limits, const KernelResources& kernel, const LaunchShape& shape,
                  uint64_t dynamic_shared_bytes) {
  for (int i = 0; i < 3; ++i) {
    if (shape.grid[i] == 0 || shape.grid[i] > kMaxGridDimension[i]) {
      throw CudaError(cudaErrorInvalidConfiguration, "the grid is " + shape_text(shape.grid));
    }
    if (shape.block[i] == 0 || shape.block[i] > static_cast<uint32_t>(kMaxBlockDimension[i])) {
      throw CudaError(cudaErrorInvalidConfiguration, "the block is " + shape_text(shape.block));
    }
  }
  const int64_t threads = int64_t{shape.block[0]} * shape.block[1] * shape.block[2];
  if (threads > limits.max_threads_per_block) {
    throw CudaError(cudaErrorInvalidConfiguration,
                    "a block of " + std::to_string(threads) + " threads, the device allows " +
                        std::to_string(limits.max_threads_per_block));
  }
  if (shape.cluster[0] != 1 || shape.cluster[1] != 1 || shape.cluster[2] != 1) {
    throw CudaError(cudaErrorNotSupported,
                    "clusters are not emulated, this one is " + shape_text(shape.cluster));
  }
  if (launch_bound(kernel) != 0 && threads > launch_bound(kernel)) {
    throw CudaError(cudaErrorInvalidValue, "a block of " + std::to_string(threads) +
                                               " threads, the launch bounds allow " +
                                               std::to_string(launch_bound(kernel)));
  }
  for (int i = 0; i < 3; ++i) {
    const auto required = static_cast<uint32_t>(kernel.required_threads[i]);
    if (required != 0 && shape.block[i] != required) {
      throw CudaError(cudaErrorInvalidValue,
                      "the block is " + shape_text(shape.block) + ", .reqntid demands another");
    }
  }
  if (dynamic_shared_bytes > static_cast<uint64_t>(kernel.max_dynamic_shared_bytes)) {
    throw CudaError(cudaErrorInvalidValue, std::to_string(dynamic_shared_bytes) +
                                               " bytes of dynamic shared memory, the "
                                               "kernel's limit is " +
                                               std::to_string(kernel.max_dynamic_shared_bytes) +
                                               " (cudaFuncAttributeMaxDynamicSharedMemorySize)");
  }
  if (!registers_suffice(limits, kernel, threads)) {
    throw CudaError(
        cudaErrorLaunchOutOfResources,
        std::to_string(threads) + " threads of " + std::to_string(kernel.registers) + " registers");
  }
}

int max_threads_per_block(const Limits& limits, const KernelResources& kernel) {
  int threads = limits.max_threads_per_block;
  while (threads > 0 && !registers_suffice(limits, kernel, threads)) threads -= kWarp;
  const int bound = launch_bound(kernel);
  return bound == 0 ? threads : std::min(threads, bound);
}

int resident_blocks(const Limits& limits, const KernelResources& kernel, int threads,
                    uint64_t dynamic_shared_bytes) {
  if (threads > max_threads_per_block(limits, kernel) ||
      dynamic_shared_bytes > static_cast<uint64_t>(kernel.max_dynamic_shared_bytes)) {
    return 0;
  }
  const int64_t warps = (threads + kWarp - 1) / kWarp;
  int64_t blocks = std::min<int64_t>(limits.max_blocks_per_multiprocessor,
                                     limits.max_threads_per_multiprocessor / kWarp / warps);
  if (kernel.registers > 0) {
    const int64_t partition = limits.registers_per_multiprocessor / kPartitions;
    blocks = std::min(blocks, partition / warp_registers(kernel) * kPartitions / warps);
  }
  const int64_t shared =
      round_up(kernel.static_shared_bytes + static_cast<int64_t>(dynamic_shared_bytes) +
                   limits.shared_reserved_per_block,
               kSharedUnit);
  return static_cast<int>(std::min(blocks, limits.shared_per_multiprocessor / shared));
}

}  // namespace emulator
