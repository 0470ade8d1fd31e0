#include <algorithm>
#include <string>

#include "core/block.h"
#include "core/launch.h"
#include "memory/shared_memory.h"
#include "tensor_core/multiply.h"
#include "tensor_core/wgmma.h"

namespace emulator {

Warpgroup& Warpgroup::of(Warp& warp) {
  if (!warp.wgmma_queue) {
    Block& block = warp.block();
    const int first = warp.index() / kWarpsOfGroup * kWarpsOfGroup;
    const auto group = std::make_shared<Warpgroup>(block, first);
    for (int w = first; w < std::min(first + kWarpsOfGroup, block.warps()); ++w) {
      block.warp(w).wgmma_queue = group;
    }
  }
  return *static_cast<Warpgroup*>(warp.wgmma_queue.get());
}

Warpgroup::Warpgroup(Block& block, int first_warp)
    : block_(block),
      warps_(std::min(kWarpsOfGroup, block.warps() - first_warp)),
      agent_(block.new_agent()) {
  for (int w = 0; w < warps_; ++w)
    members_[static_cast<size_t>(w)].warp = &block.warp(first_warp + w);
}

bool Warpgroup::issued_by_all(uint64_t end) {
  return std::all_of(members_.begin(), members_.begin() + warps_,
                     [end](const Member& m) { return m.issued >= end; });
}

// ---- issue ---------------------------------------------------------------------------

namespace {

// The value that all lanes must share.
uint64_t uniform(Warp& warp, const Step& step, const Slot& slot, const char* name) {
  const std::string use = std::string("is ") + name;
  warp.require_defined(step, slot, kAllLanes, use.c_str());
  const uint64_t value = warp.value(slot, 0);
  for (int l = 1; l < kLanes; ++l) {
    if (warp.value(slot, l) == value) continue;
    warp.report(Check::Convergence, step, l, std::string("the lanes disagree on ") + name);
    break;
  }
  return value;
}

// The first of the registers that an instruction after number `serial` wrote; −1: none.
int first_written_after(const Warp& warp, const Slot* slots, int count, uint64_t serial) {
  for (int r = 0; r < count; ++r) {
    if (warp.written(slots[r]) > serial) return r;
  }
  return -1;
}

bool uniform_predicate(Warp& warp, const Step& step, const Slot& slot) {
  warp.require_defined(step, slot, kAllLanes, "is scale-d");
  const LaneMask holds = warp.predicate(slot);
  if (holds != 0 && holds != kAllLanes) {
    warp.report(Check::Convergence, step, first_lane(holds), "the lanes disagree on scale-d");
  }
  return (holds & 1) != 0;
}

}  // namespace

// The operation that the warp comes to next; the first warp to come makes it.
Warpgroup::Operation& Warpgroup::join(Warp& warp, const Step& step) {
  const auto& wgmma = static_cast<const Wgmma&>(*step.detail);
  const Slot* a = step.slots.data() + wgmma.registers();
  const Slot* b = a + wgmma.a_slots();
  const bool has_predicate = b + 1 != step.slots.data() + step.slots.size();
  const bool accumulate =
      has_predicate ? uniform_predicate(warp, step, b[1]) != wgmma.scale_d_negated : wgmma.scale_d;
  const uint64_t a_descriptor =
      wgmma.a_in_registers ? 0 : uniform(warp, step, *a, "the descriptor of A");
  const uint64_t b_descriptor = uniform(warp, step, *b, "the descriptor of B");
  Member& mine = member(warp);
  if (mine.issued == first_ + operations_.size()) {
    operations_.emplace_back();
    Operation& made = operations_.back();
    made.step = &step;
    made.a = a_descriptor;
    made.b = b_descriptor;
    made.accumulate = accumulate;
    return made;
  }
  Operation& joined = operation(mine.issued);
  if (joined.step != &step) {
    const std::string what = "the warps of a warpgroup run different wgmma.mma_async instructions";
    warp.report(Check::Convergence, step, 0, what);
    throw LaunchEnd(what);  // there is no operation that they are parts of
  }
  if (joined.a != a_descriptor || joined.b != b_descriptor || joined.accumulate != accumulate) {
    warp.report(Check::Convergence, step, 0,
                "the warps of a warpgroup disagree on a descriptor or on scale-d");
  }
  return joined;
}

void Warpgroup::issue(Warp& warp, const Step& step) {
  const auto& wgmma = static_cast<const Wgmma&>(*step.detail);
  if (warps_ < kWarpsOfGroup) {
    warp.report(Check::Convergence, step, 0,
                "the warpgroup has only " + std::to_string(warps_) + " of its 4 warps");
  }
  if (warp.wgmma_fence_serial == 0) {
    warp.report(Check::Asynchronous, step, 0, "wgmma.mma_async before the first wgmma.fence");
  }
  Operation& operation = join(warp, step);
  Part& part = operation.parts[static_cast<size_t>(place_of(warp))];
  part.issued = warp.serial();
  if (wgmma.a_in_registers) {
    take_a(warp, step, &part);
  } else {
    announce(warp, step, wgmma.a(operation.a, place_of(warp)), &operation.tickets);
  }
  announce(warp, step, wgmma.b(operation.b), &operation.tickets);
  part.accumulator = &take_accumulator(warp, step, operation.accumulate);

  ++member(warp).issued;
  if (++operation.issued < warps_) return;
  for (int w = 0; w < warps_; ++w) {
    Member& other = members_[static_cast<size_t>(w)];
    if (!other.waiting || !issued_by_all(other.target)) continue;
    other.waiting = false;
    complete(other, other.target);
    other.warp->resume(kAllLanes);
  }
}

// A register's values at issue are those that count: what changes them before the wait is a
// finding.
void Warpgroup::take_a(Warp& warp, const Step& step, Part* part) {
  const auto& wgmma = static_cast<const Wgmma&>(*step.detail);
  const Slot* a = step.slots.data() + wgmma.registers();
  const int touched = first_written_after(warp, a, wgmma.a_slots(), warp.wgmma_fence_serial);
  if (touched >= 0) {
    warp.report(
        Check::Asynchronous, step, 0,
        "register " + std::to_string(touched) + " of A was modified after the last wgmma.fence");
  }
  part->a.resize(static_cast<size_t>(kTileRows * wgmma.k));
  const auto load = wgmma.format == TensorFormat::F16    ? load_a<TensorFormat::F16>
                    : wgmma.format == TensorFormat::BF16 ? load_a<TensorFormat::BF16>
                                                         : load_a<TensorFormat::TF32>;
  part->undefined_rows = load(warp, a, wgmma.k, part->a.data());
  for (float& value : part->a) value *= wgmma.a_sign;
}

Warpgroup::Accumulator& Warpgroup::take_accumulator(Warp& warp, const Step& step, bool accumulate) {
  const auto& wgmma = static_cast<const Wgmma&>(*step.detail);
  const Slot* d = step.slots.data();
  Accumulator& accumulator = member(warp).accumulators[wgmma.accumulator];
  const bool same_shape = accumulator.step == nullptr ||
                          wgmma.same_shape(static_cast<const Wgmma&>(*accumulator.step->detail));
  if (accumulator.in_flight == 0) {
    // What a wgmma of the same shape left in the registers needs no fence.
    const uint64_t ordered = same_shape ? std::max(warp.wgmma_fence_serial, accumulator.stored)
                                        : warp.wgmma_fence_serial;
    const int touched = first_written_after(warp, d, wgmma.registers(), ordered);
    if (touched >= 0) {
      warp.report(Check::Asynchronous, step, 0,
                  "register " + std::to_string(touched) +
                      " of the accumulator was modified after the last wgmma.fence");
    }
    accumulator.issued = warp.serial();
    accumulator.values.assign(static_cast<size_t>(kTileRows * wgmma.n), 0.0f);
    accumulator.undefined.reset();
    if (accumulate) {
      const auto load =
          wgmma.half ? load_accumulator<true, kMaxColumns> : load_accumulator<false, kMaxColumns>;
      load(warp, d, wgmma.n, accumulator.values.data(), &accumulator.undefined);
    }
    for (int r = 0; r < wgmma.registers(); ++r) {
      for (int l = 0; l < kLanes; ++l) warp.set_undefined(d[r], l, ~uint64_t{0});
    }
  } else if (!same_shape && warp.wgmma_fence_serial <= accumulator.last_issued) {
    warp.report(Check::Asynchronous, step, 0,
                "the accumulator is in flight in a wgmma of another shape, and no wgmma.fence came "
                "between");
  }
  accumulator.step = &step;
  accumulator.last_issued = warp.serial();
  ++accumulator.in_flight;
  return accumulator;
}

// Tells the race checks that the operand is being read from now on.
void Warpgroup::announce(Warp& warp, const Step& step, const SharedOperand& operand,
                         std::vector<uint32_t>* tickets) {
  SharedMemory& shared = block_.shared();
  for (const SharedOperand::Range& range : operand.ranges()) {
    if (shared.inside(range.begin, range.end - range.begin)) {
      if (!block_.settings().check_races) continue;
      SharedRaces::Access read{&warp, &step, 0, range.begin, range.end - range.begin, false};
      read.async_proxy = true;
      tickets->push_back(shared.races.begin(read));
      continue;
    }
    for (uint32_t at = range.begin; at < range.end; at += SharedOperand::kChunk) {
      uint8_t value[SharedOperand::kChunk], undefined[SharedOperand::kChunk];
      if (shared.inside(at, sizeof value)) continue;
      shared.load(warp, step, 0, at, sizeof value, value, undefined, true);  // refuses, and says so
      break;
    }
  }
}

// ---- groups --------------------------------------------------------------------------

void Warpgroup::commit(Warp& warp) {
  Member& mine = member(warp);
  mine.groups.push_back(mine.issued);
}

bool Warpgroup::wait(Warp& warp, size_t pending) {
  Member& mine = member(warp);
  mine.target = mine.waited;
  while (mine.groups.size() > pending) {
    mine.target = mine.groups.front();
    mine.groups.pop_front();
  }
  mine.waiting = !issued_by_all(mine.target);
  if (!mine.waiting) complete(mine, mine.target);
  return !mine.waiting;
}

void Warpgroup::execute(Operation& operation) {
  const Wgmma& wgmma = operation.wgmma();
  SharedMemory& shared = block_.shared();
  const auto n = static_cast<uint32_t>(wgmma.n), k = static_cast<uint32_t>(wgmma.k);
  std::vector<float> a(kTileRows * k), b(k * n);
  const SharedOperand::Rows columns =
      wgmma.b(operation.b).read(shared, wgmma.b_sign, b.data(), 1, n);
  const Summation summation = summation_of(block_);
  for (int w = 0; w < warps_; ++w) {
    Part& part = operation.parts[static_cast<size_t>(w)];
    Accumulator& d = *part.accumulator;
    if (!operation.accumulate) {
      std::fill(d.values.begin(), d.values.end(), 0.0f);
      d.undefined.reset();
    }
    if (!wgmma.a_in_registers) {
      const SharedOperand::Rows rows =
          wgmma.a(operation.a, w).read(shared, wgmma.a_sign, a.data(), k, 1);
      part.undefined_rows = static_cast<uint32_t>(rows.to_ulong());
    }
    const float* left = wgmma.a_in_registers ? part.a.data() : a.data();
    multiply(wgmma.format, wgmma.half, summation, left, b.data(), d.values.data(), wgmma.n,
             wgmma.k);
    if (part.undefined_rows != 0 || columns.any()) {
      const auto whole = [&columns](int column) { return columns[static_cast<size_t>(column)]; };
      spread_undefined<kMaxColumns>(part.undefined_rows, whole, wgmma.n, &d.undefined);
    }
  }
  operation.epoch = block_.advance(agent_);
  for (const uint32_t ticket : operation.tickets)
    shared.races.end_by_agent(agent_, operation.epoch, ticket);
}

// The warp knows that its operations before `end` are done.
void Warpgroup::complete(Member& member, uint64_t end) {
  if (member.waited == end) return;
  while (executed_ < end) execute(operation(executed_++));
  const auto part = static_cast<size_t>(member.warp->index() % kWarpsOfGroup);
  for (; member.waited < end; ++member.waited) {
    Operation& done = operation(member.waited);
    finish(member, done, done.parts[part]);
  }
  Block::learn(*member.warp, kAllLanes, agent_, operation(end - 1).epoch);
  const auto slowest =
      std::min_element(members_.begin(), members_.begin() + warps_,
                       [](const Member& a, const Member& b) { return a.waited < b.waited; });
  while (first_ < slowest->waited) {
    operations_.pop_front();
    ++first_;
  }
}

void Warpgroup::finish(Member& member, const Operation& operation, Part& part) {
  Warp& warp = *member.warp;
  const Step& step = *operation.step;
  const Wgmma& wgmma = operation.wgmma();
  const auto check_untouched = [&](const Slot* slots, int count, uint64_t since, const char* what) {
    const int touched = first_written_after(warp, slots, count, since);
    if (touched < 0) return;
    warp.report(Check::Asynchronous, step, 0,
                "register " + std::to_string(touched) + " of " + what +
                    " was modified before a wgmma.wait_group covered the operation");
  };
  const Slot* d_slots = step.slots.data();
  if (wgmma.a_in_registers) {
    check_untouched(d_slots + wgmma.registers(), wgmma.a_slots(), part.issued, "A");
  }
  Accumulator& d = *part.accumulator;
  if (--d.in_flight != 0) return;
  check_untouched(d_slots, wgmma.registers(), d.issued, "the accumulator");
  const auto store =
      wgmma.half ? store_accumulator<true, kMaxColumns> : store_accumulator<false, kMaxColumns>;
  store(warp, d_slots, wgmma.n, d.values.data(), d.undefined);
  d.stored = warp.serial();
}

}  // namespace emulator
