// Control flow (PTX ISA 9.7.12, "Control Flow Instructions") and what ends a run.
#include "core/binder.h"
#include "core/block.h"
#include "core/launch.h"
#include "core/warp.h"

namespace emulator {

namespace {

// immediate[0]: the target.
void run_bra(Warp& warp, const Step& step, LaneMask active) {
  warp.branch(active, static_cast<int>(step.immediate[0]));
}

void bind_bra(Binder& b) {
  b.take("uni");
  b.done();
  b.step.immediate[0] = b.label(0);
  b.step.flow = Flow::Branch;
  b.step.run = run_bra;
}

void run_exit(Warp& warp, const Step&, LaneMask active) {
  warp.exit(active);
}

void bind_exit(Binder& b) {
  b.take("uni");
  b.done();
  b.step.flow = Flow::Blocking;
  b.step.run = run_exit;
}

[[noreturn]] void end(Warp& warp, const Step& step, LaneMask active, const std::string& what) {
  warp.report(Check::Assertion, step, first_lane(active), what);
  throw LaunchEnd(what);
}

void run_trap(Warp& warp, const Step& step, LaneMask active) {
  end(warp, step, active, "the kernel trapped");
}

void bind_trap(Binder& b) {
  b.done();
  b.step.run = run_trap;
}

void run_assertion(Warp& warp, const Step& step, LaneMask active) {
  end(warp, step, active, "an assertion failed");
}

// Functions are inlined by the compilers, except for the one that reports a failed assert().
void bind_call(Binder& b) {
  for (int i = 0; i < b.operand_count(); ++i) {
    if (b.operand(i).kind == ptx::Operand::Kind::Symbol && b.operand(i).name == "__assertfail") {
      b.step.run = run_assertion;
      return;
    }
  }
  b.unsupported("a call of a function");
}

void run_nothing(Warp&, const Step&, LaneMask) {}

// setmaxnreg only moves registers between warps, pmevent and pragma-like hints change nothing that
// a program sees, and a launch here never overlaps another (griddepcontrol).
void bind_nothing(Binder& b) {
  b.step.run = run_nothing;
}

void bind_setmaxnreg(Binder& b) {
  b.step.run = run_nothing;
  b.step.flow = Flow::Converged;
}

void run_nanosleep(Warp& warp, const Step&, LaneMask) {
  warp.yield();
  warp.advance();
}

void bind_nanosleep(Binder& b) {
  b.step.flow = Flow::Blocking;
  b.step.run = run_nanosleep;
}

}  // namespace

void add_control(Opcodes& opcodes) {
  opcodes.add("bra", bind_bra);
  opcodes.add("ret", bind_exit);
  opcodes.add("exit", bind_exit);
  opcodes.add("trap", bind_trap);
  opcodes.add("brkpt", bind_trap);
  opcodes.add("call", bind_call);
  opcodes.add("setmaxnreg", bind_setmaxnreg);
  opcodes.add("griddepcontrol", bind_nothing);
  opcodes.add("pmevent", bind_nothing);
  opcodes.add("nanosleep", bind_nanosleep);
}

}  // namespace emulator
