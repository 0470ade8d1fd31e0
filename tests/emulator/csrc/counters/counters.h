// What a launch did, in units that a GPU's profiler counts too. Instructions and requests are a
// warp's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/lanes.h"

namespace emulator {

class Program;
struct Step;

// Of one instruction of the kernel.
struct StepCounters {
  int opcode = 0;  // index into Counters::opcodes
  int ptx_line = 0;
  int cuda_line = 0;
  uint64_t executed = 0;
  uint64_t lanes = 0;  // summed over executions
  // Global memory: 32-byte sectors touched, against the fewest that could hold the bytes.
  uint64_t requests = 0;
  uint64_t sectors = 0;
  uint64_t ideal_sectors = 0;
  // Shared memory: passes over the 32 banks, against the fewest that could carry the bytes.
  uint64_t shared_requests = 0;
  uint64_t wavefronts = 0;
  uint64_t ideal_wavefronts = 0;
};

struct BufferCounters {
  std::string name;
  uint64_t bytes_read = 0, bytes_written = 0;    // by all requests
  uint64_t unique_read = 0, unique_written = 0;  // each byte once: the DRAM lower bound
};

class Counters {
 public:
  Counters() = default;
  explicit Counters(const Program& program);

  // `bytes` are each lane's; the lanes' addresses may coincide.
  void global_request(const Step& step, const uint64_t* addresses, LaneMask lanes, int bytes);
  void shared_request(const Step& step, const uint32_t* addresses, LaneMask lanes, int bytes);

  std::vector<StepCounters> steps;   // by pc
  std::vector<std::string> opcodes;  // root and modifiers
  std::vector<BufferCounters> buffers;
};

}  // namespace emulator
