#include "tensor_core/wgmma.h"

#include <cstdio>
#include <memory>
#include <string>

#include "core/binder.h"
#include "tensor_core/vector_operand.h"

namespace emulator {

namespace {

void run_mma_async(Warp& warp, const Step& step, LaneMask active) {
  if (whole_warp(warp, step, active)) Warpgroup::of(warp).issue(warp, step);
}

void run_fence(Warp& warp, const Step&, LaneMask) {
  warp.wgmma_fence_serial = warp.serial();
}

void run_commit_group(Warp& warp, const Step& step, LaneMask active) {
  if (whole_warp(warp, step, active)) Warpgroup::of(warp).commit(warp);
}

// step.immediate[0]: the groups that may stay in flight.
void run_wait_group(Warp& warp, const Step& step, LaneMask) {
  if (!warp.gather(step, warp.live())) return;
  const bool whole = whole_warp(warp, step, warp.group().lanes);
  if (!whole || Warpgroup::of(warp).wait(warp, static_cast<size_t>(step.immediate[0]))) {
    warp.advance();
  } else {
    warp.wait();
  }
}

// imm-scale-a, imm-scale-b: −1 negates the operand.
float bind_sign(Binder& binder, int operand) {
  const int64_t sign = binder.immediate(operand);
  if (sign != 1 && sign != -1) binder.unsupported("an operand scale other than 1 and -1");
  return static_cast<float>(sign);
}

// imm-trans-a, imm-trans-b: 1 is MN-major.
bool bind_transpose(Binder& binder, int operand) {
  const int64_t transpose = binder.immediate(operand);
  if (transpose != 0 && transpose != 1) binder.unsupported("a transposition other than 0 and 1");
  return transpose == 1;
}

void bind_shape_and_types(Binder& binder, Wgmma* wgmma) {
  const std::string shape = binder.next();
  int end = 0;
  if (std::sscanf(shape.c_str(), "m64n%dk%d%n", &wgmma->n, &wgmma->k, &end) != 2 ||
      end != static_cast<int>(shape.size()) || wgmma->n < 8 || wgmma->n > kMaxColumns ||
      wgmma->n % 8 != 0) {
    binder.unsupported("wgmma.mma_async of the shape `" + shape + "`");
  }
  binder.take(shape);
  std::string types;
  for (int i = 0; i < 3; ++i) {
    types += "." + binder.next();
    binder.take(binder.next());
  }
  binder.done();
  if (types == ".f32.f16.f16" || types == ".f16.f16.f16") {
    wgmma->format = TensorFormat::F16;
  } else if (types == ".f32.bf16.bf16") {
    wgmma->format = TensorFormat::BF16;
  } else if (types == ".f32.tf32.tf32") {
    wgmma->format = TensorFormat::TF32;
  } else {
    binder.unsupported("wgmma.mma_async of the types " + types);
  }
  wgmma->half = types.compare(0, 4, ".f16") == 0;
  if (wgmma->k * bytes_of(wgmma->format) != 32)
    binder.unsupported("wgmma.mma_async of the shape `" + shape + "`");
}

// d, a or a-descriptor, b-descriptor, scale-d, imm-scale-a, imm-scale-b {, imm-trans-a} {,
// imm-trans-b}: an A in registers has no imm-trans-a, and tf32 has neither.
void bind_mma_async(Binder& binder) {
  static const ptx::Type kDescriptor{ptx::Type::Class::Bits, 64, 1};
  binder.step.flow = Flow::Converged;
  const auto wgmma = std::make_shared<Wgmma>();
  bind_shape_and_types(binder, wgmma.get());
  bind_registers(binder, 0, wgmma->registers(), Direction::Destination);
  for (const Slot& slot : binder.step.slots) {
    if (!slot.valid) binder.unsupported("a wgmma accumulator without a register");
    wgmma->accumulator.push_back(slot.index);
  }
  wgmma->a_in_registers = binder.operand(1).kind == ptx::Operand::Kind::Vector;
  if (wgmma->a_in_registers) {
    bind_registers(binder, 1, wgmma->a_slots(), Direction::Source);
  } else {
    binder.step.slots.push_back(binder.source(1, kDescriptor));
  }
  binder.step.slots.push_back(binder.source(2, kDescriptor));
  if (binder.is_immediate(3)) {
    wgmma->scale_d = binder.immediate(3) != 0;
  } else {
    binder.step.slots.push_back(binder.predicate(binder.operand(3), &wgmma->scale_d_negated));
  }
  wgmma->a_sign = bind_sign(binder, 4);
  wgmma->b_sign = bind_sign(binder, 5);
  int next = 6;
  if (wgmma->format != TensorFormat::TF32) {
    if (!wgmma->a_in_registers) wgmma->a_mn_major = bind_transpose(binder, next++);
    wgmma->b_mn_major = bind_transpose(binder, next++);
  }
  if (binder.operand_count() != next) binder.unsupported("more operands than wgmma.mma_async has");
  binder.step.detail = wgmma;
  binder.step.run = run_mma_async;
}

void bind_wgmma(Binder& binder) {
  const std::string name = binder.next();
  binder.take(name);
  if (!binder.take("sync") || !binder.take("aligned"))
    binder.unsupported("wgmma without .sync.aligned");
  if (name == "mma_async") return bind_mma_async(binder);
  binder.done();
  if (name == "fence") {
    binder.step.flow = Flow::Converged;
    binder.step.run = run_fence;
  } else if (name == "commit_group") {
    binder.step.flow = Flow::Converged;
    binder.step.run = run_commit_group;
  } else if (name == "wait_group") {
    binder.step.flow = Flow::Blocking;
    binder.step.immediate[0] = binder.immediate(0);
    binder.step.run = run_wait_group;
  } else {
    binder.unsupported("wgmma." + name);
  }
}

}  // namespace

void add_wgmma(Opcodes& opcodes) {
  opcodes.add("wgmma", bind_wgmma);
}

}  // namespace emulator
