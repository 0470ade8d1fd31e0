// One instruction made ready to run: its handler, and where in a warp's frame its operands lie.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/lanes.h"
#include "ptx/program.h"

namespace emulator {

class Warp;
struct Step;

// 32 values of a virtual register, or of a constant, which lies in the frame like one:
// lane l's value at `offset + l * width`. A predicate is one 32-bit lane mask (width 0).
struct Slot {
  uint32_t offset = 0;
  uint32_t index = 0;  // of its taint mask
  uint8_t width = 0;   // bytes of a lane's value
  bool valid = false;  // false: no register, the sink `_`
};

// Runs `step` for the lanes of `active`, a set that is not empty and to which the guard was
// applied. A handler must be total: it may compute garbage for lanes outside `active` but never
// trap on it.
using Handler = void (*)(Warp& warp, const Step& step, LaneMask active);

// Whatever else a handler wants to know; made once, shared by all warps.
struct Detail {
  virtual ~Detail() = default;
};

// What the scheduler itself must know of an instruction.
enum class Flow : uint8_t {
  Next,       // falls through
  Branch,     // sets the program counters itself
  Converged,  // .aligned: every live lane of the warp must be here before it runs
  Blocking,   // may leave lanes waiting (sets the program counters itself)
};

struct Step {
  Handler run = nullptr;
  std::vector<Slot> slots;              // operands in an order of the handler's own
  int64_t immediate[4] = {0, 0, 0, 0};  // small constants of the handler's own
  std::shared_ptr<const Detail> detail;
  Slot guard;  // valid: only lanes where it holds (or not, if negated) run
  bool guard_negated = false;
  Flow flow = Flow::Next;
  int opcode = 0;  // index into the program's opcode names, for the counters
  int pc = 0;
  const ptx::Instruction* source = nullptr;
};

}  // namespace emulator
