// wgmma.mma_async and its groups (PTX ISA 9.7.15): what a warpgroup has in flight.
//
// An operation belongs to four warps. It reads shared memory and registers at any time between the
// moment when the last of them has issued it and the moment when the first of them has waited for
// it; so the reads are announced to the race checks at issue and done at the first wait. Until a
// warp has waited, its accumulator registers are undefined: the values are kept here, where
// operations on the same registers follow one another, and go into the registers when nothing that
// is in flight uses them any more.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "core/step.h"
#include "core/warp.h"
#include "tensor_core/formats.h"
#include "tensor_core/registers.h"
#include "tensor_core/shared_operand.h"

namespace emulator {

constexpr int kWarpsOfGroup = 4;

// One wgmma.mma_async instruction. Its step's slots: D, then A's registers or its descriptor, B's
// descriptor, and scale-d where that is a predicate.
struct Wgmma : Detail {
  TensorFormat format = TensorFormat::F16;
  bool half = false;  // fp16 accumulators
  int n = 0, k = 0;
  bool a_in_registers = false;
  bool a_mn_major = false, b_mn_major = false;
  float a_sign = 1, b_sign = 1;  // imm-scale-a, imm-scale-b
  bool scale_d = true;           // where there is no predicate
  bool scale_d_negated = false;
  std::vector<uint32_t> accumulator;  // D's registers, by the index of their slots

  int registers() const { return accumulator_registers(half, n); }
  int a_slots() const { return a_in_registers ? a_registers(bytes_of(format), k) : 1; }
  SharedOperand a(uint64_t descriptor, int warp_of_group) const {
    return {MatrixDescriptor(descriptor),
            a_mn_major,
            format,
            static_cast<uint32_t>(kTileRows * warp_of_group),
            kTileRows,
            static_cast<uint32_t>(k)};
  }
  SharedOperand b(uint64_t descriptor) const {
    return {MatrixDescriptor(descriptor), b_mn_major, format, 0, static_cast<uint32_t>(n),
            static_cast<uint32_t>(k)};
  }
  bool same_shape(const Wgmma& o) const { return n == o.n && k == o.k && half == o.half; }
};

class Warpgroup {
 public:
  // The warpgroup that the warp belongs to; made when first asked for.
  static Warpgroup& of(Warp& warp);
  Warpgroup(Block& block, int first_warp);

  void issue(Warp& warp, const Step& step);
  void commit(Warp& warp);
  // Waits until at most `pending` of the warp's groups are in flight. False: other warps have not
  // issued their part yet; the warp is resumed when they have.
  bool wait(Warp& warp, size_t pending);

 private:
  // The values of D, of one warp, while operations on them are in flight.
  struct Accumulator {
    std::vector<float> values;
    TileSet<kMaxColumns> undefined;
    const Step* step = nullptr;  // the last that was issued
    // In the warp's count of instructions: the first and the last issue of those in flight, and
    // when the result went into the registers.
    uint64_t issued = 0, last_issued = 0, stored = 0;
    int in_flight = 0;
  };
  // One warp's share of an operation: 16 of its 64 rows.
  struct Part {
    Accumulator* accumulator = nullptr;
    uint64_t issued = 0;   // in the warp's count of instructions
    std::vector<float> a;  // from registers
    uint32_t undefined_rows = 0;
  };
  struct Operation {
    const Step* step = nullptr;
    uint64_t a = 0, b = 0;  // descriptors
    bool accumulate = false;
    std::array<Part, kWarpsOfGroup> parts;
    int issued = 0;
    std::vector<uint32_t> tickets;  // of the reads under way
    uint32_t epoch = 0;             // of the agent, once it is done

    const Wgmma& wgmma() const { return static_cast<const Wgmma&>(*step->detail); }
  };
  struct Member {
    Warp* warp = nullptr;
    uint64_t issued = 0, waited = 0;  // operations
    std::deque<uint64_t> groups;      // the operations issued before each wgmma.commit_group
    uint64_t target = 0;              // what it waits for
    bool waiting = false;
    std::map<std::vector<uint32_t>, Accumulator> accumulators;
  };

  static int place_of(const Warp& warp) { return warp.index() % kWarpsOfGroup; }
  Member& member(const Warp& warp) { return members_[static_cast<size_t>(place_of(warp))]; }
  Operation& operation(uint64_t index) { return operations_[static_cast<size_t>(index - first_)]; }
  bool issued_by_all(uint64_t end);

  Operation& join(Warp& warp, const Step& step);
  void take_a(Warp& warp, const Step& step, Part* part);
  Accumulator& take_accumulator(Warp& warp, const Step& step, bool accumulate);
  void announce(Warp& warp, const Step& step, const SharedOperand& operand,
                std::vector<uint32_t>* tickets);
  void execute(Operation& operation);
  void complete(Member& member, uint64_t end);
  void finish(Member& member, const Operation& operation, Part& part);

  Block& block_;
  int warps_;  // four, unless the block ends before
  int agent_;  // races/clock.h
  std::array<Member, kWarpsOfGroup> members_;
  std::deque<Operation> operations_;  // from number `first_` on
  uint64_t first_ = 0;
  uint64_t executed_ = 0;
};

}  // namespace emulator
