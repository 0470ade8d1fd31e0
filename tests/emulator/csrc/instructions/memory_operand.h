// What ld, st, atom and red say alike: state space, ordering, scope, cache hints, and the address.
#pragma once

#include <cstdint>

#include "core/binder.h"
#include "core/warp.h"
#include "races/global_races.h"

namespace emulator {

struct MemoryOperand {
  ptx::Space space = ptx::Space::Generic;
  Ordering ordering;
  int64_t offset = 0;

  // .weak .volatile .relaxed .acquire .release .acq_rel, the scope, the space and the cache hints,
  // in any order.
  void take_modifiers(Binder& binder);
  Slot take_address(Binder& binder, int operand);
};

// The addresses of one warp-wide request, each in its own space; counted as it is made.
class Request {
 public:
  Request(Warp& warp, const Step& step, LaneMask active, const MemoryOperand& operand, int bytes);
  ptx::Space space(int lane) const { return spaces_[lane]; }
  uint64_t address(int lane) const { return addresses_[lane]; }

 private:
  uint64_t addresses_[kLanes];
  ptx::Space spaces_[kLanes];
};

}  // namespace emulator
