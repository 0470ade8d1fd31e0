// Generic addresses (PTX ISA, "Generic Addressing"): windows in which the other spaces appear.
// Global memory and constants, which have memory of their own in it, appear as they are.
#pragma once

#include <cstdint>

#include "ptx/program.h"

namespace emulator {

constexpr uint64_t kWindowBytes = uint64_t{1} << 32;
constexpr uint64_t kSharedWindow = 0x2000'0000'0000;
constexpr uint64_t kLocalWindow = 0x2100'0000'0000;
constexpr uint64_t kParameterWindow = 0x2200'0000'0000;
constexpr uint64_t kConstantWindow = 0;
// Where allocations begin; nothing of theirs is below.
constexpr uint64_t kGlobalBase = 0x7000'0000'0000;

inline bool in_window(uint64_t address, uint64_t window) {
  return address >= window && address - window < kWindowBytes;
}

// The space that a generic address lies in, and the address in that space.
inline ptx::Space resolve_generic(uint64_t generic, uint64_t* address) {
  if (in_window(generic, kSharedWindow)) {
    *address = generic - kSharedWindow;
    return ptx::Space::Shared;
  }
  if (in_window(generic, kLocalWindow)) {
    *address = generic - kLocalWindow;
    return ptx::Space::Local;
  }
  if (in_window(generic, kParameterWindow)) {
    *address = generic - kParameterWindow;
    return ptx::Space::Parameter;
  }
  *address = generic;
  return ptx::Space::Global;
}

}  // namespace emulator
