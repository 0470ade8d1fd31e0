// A block's shared memory, checked: bounds, alignment, validity of every byte, and races.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/warp.h"
#include "races/shared_races.h"

namespace emulator {

// The hardware keeps the first KiB of a block's shared memory for itself (CUDA Programming Guide,
// "Reserved shared memory per block"), so variables begin there; address 0 is never valid.
constexpr uint32_t kSharedBase = 1024;

class SharedMemory {
 public:
  // Names for reports: (first byte, bytes, name), in order.
  struct Variable {
    uint32_t address;
    uint32_t bytes;
    std::string name;
  };
  SharedMemory(uint32_t bytes, std::vector<Variable> variables);

  // An ordinary (generic proxy) access by one lane. `undefined` has 0xff for every undefined byte.
  // False: nothing was done, a finding was recorded, and a load's value is zero and defined.
  // `async_proxy`: for wgmma's operands; bytes that ordinary stores wrote must have been ordered by
  // fence.proxy.async as well.
  bool load(Warp& warp, const Step& step, int lane, uint32_t address, int bytes, void* value,
            uint8_t* undefined, bool async_proxy = false);
  bool store(Warp& warp, const Step& step, int lane, uint32_t address, int bytes, const void* value,
             const uint8_t* undefined);

  // Unchecked: for what the asynchronous agents do once they have been checked.
  uint8_t* data(uint32_t address) { return bytes_.data() + (address - kSharedBase); }
  uint8_t* undefined(uint32_t address) { return undefined_.data() + (address - kSharedBase); }
  bool inside(uint32_t address, uint64_t bytes) const {
    return address >= kSharedBase && address + bytes <= kSharedBase + bytes_.size();
  }
  // "shared memory `tile` + 16 bytes", for reports.
  std::string describe(uint32_t address) const;
  uint32_t size() const { return static_cast<uint32_t>(bytes_.size()); }
  SharedRaces races;

 private:
  bool refuse(Warp& warp, const Step& step, int lane, uint32_t address, int bytes,
              const char* verb);

  std::vector<uint8_t> bytes_;
  std::vector<uint8_t> undefined_;
  std::vector<Variable> variables_;
};

}  // namespace emulator
