// What the checks found: each finding names the kernel, the line, the lane, the buffer and the
// offset.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

enum class Check {
  OutOfBounds,
  Misaligned,
  Uninitialised,
  Race,
  Asynchronous,  // an asynchronous copy or wgmma that was not waited for
  Proxy,         // generic and async proxy not ordered by a fence
  Barrier,       // divergence, wrong counts, exited threads
  Deadlock,
  Convergence,  // .sync with a mask that the lanes do not match
  Assertion,    // trap, __assertfail
};

const char* name_of(Check check);

struct Finding {
  Check check;
  std::string message;
  std::string kernel;
  int ptx_line = 0;
  std::string ptx_text;
  std::string cuda_file;  // empty: unknown
  int cuda_line = 0;
  int block[3] = {0, 0, 0};
  int thread[3] = {0, 0, 0};
  int warp = 0;
  int lane = 0;
  std::string buffer;  // empty: none
  int64_t offset = 0;  // bytes from the buffer's start; may be negative
  int64_t count = 1;   // occurrences of the same check at the same instruction
};

}  // namespace emulator
