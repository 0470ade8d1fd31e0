// The machine that is emulated: a device's limits, its memory, the modules that were loaded, and
// launches. The stand-in CUDA runtime and the Python front both drive this one.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/finding.h"
#include "core/program.h"
#include "counters/counters.h"
#include "memory/device_memory.h"

namespace emulator {

// Limits by which launches are refused; the table of devices is Python's (devices.py).
struct Limits {
  std::string name;
  int major = 8, minor = 0;
  int multiprocessors = 108;
  int max_threads_per_block = 1024;
  int max_threads_per_multiprocessor = 2048;
  int max_blocks_per_multiprocessor = 32;
  int registers_per_multiprocessor = 65536;
  int registers_per_block = 65536;
  int64_t shared_per_multiprocessor = 167936;
  int64_t shared_per_block = 49152;         // without opting in
  int64_t shared_per_block_optin = 166912;  // after cudaFuncSetAttribute
  int64_t shared_reserved_per_block = 1024;
  int64_t l2_bytes = 41943040;
  int64_t memory_bytes = int64_t{80} << 30;
};

enum class Order { Forward, Reverse, Random };

struct Settings {
  Order order = Order::Forward;
  uint64_t seed = 0;                     // of Order::Random
  bool truncating_tensor_cores = false;  // the block rule of real hardware instead of plain fp32
  bool check_races = true;
  // A warp's, in one launch, before it is taken to run forever; 0: no limit.
  uint64_t max_instructions = 100'000'000;
};

struct LaunchShape {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block[3] = {1, 1, 1};
  uint32_t cluster[3] = {1, 1, 1};
  uint32_t dynamic_shared_bytes = 0;
};

// One launch and what came of it.
struct LaunchRecord {
  std::string kernel;
  LaunchShape shape;
  Counters counters;
  std::vector<Finding> findings;
  bool completed = false;  // false: a deadlock, a trap or a refused instruction ended it
};

class Machine {
 public:
  static Machine& instance();

  Limits limits;
  Settings settings;
  DeviceMemory memory;
  // Findings and counters of every launch since the last `clear`.
  std::vector<std::unique_ptr<LaunchRecord>> launches;

  // Parses and binds a module; its .global and .const variables get memory. The handle stays valid
  // until `unload`. Throws ParseError, Unsupported.
  int load(const std::string& ptx);
  void unload(int module);
  // Throws ArgumentError that names the kernels there are.
  Program& kernel(int module, const std::string& name) const;
  std::vector<std::string> kernels(int module) const;
  // The address of a .global or .const variable and its size; false where there is none.
  bool variable(int module, const std::string& name, uint64_t* address, uint64_t* bytes) const;

  // Runs the kernel to its end. `parameters`: the kernel's parameter block, laid out as the PTX
  // declares it (Program::parameter_bytes). Launch limits are the caller's to check
  // (runtime/limits.h). Throws ArgumentError on a wrong size.
  LaunchRecord& launch(const Program& kernel, const LaunchShape& shape, const void* parameters,
                       size_t bytes);

 private:
  struct LoadedModule;
  Machine();
  ~Machine();
  LoadedModule& module(int handle) const;

  std::map<int, std::unique_ptr<LoadedModule>> modules_;
  int next_module_ = 0;
};

}  // namespace emulator
