// A warp: its frame of registers, its groups of lanes, and what its lanes know of other threads'
// work.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "common/finding.h"
#include "common/lanes.h"
#include "core/step.h"
#include "races/clock.h"

namespace emulator {

class Block;
class Program;

// Lanes that are at the same instruction. A warp starts as one group, splits at divergent branches,
// and merges again where groups meet: the group with the lowest program counter runs first.
struct Group {
  enum class State : uint8_t {
    Ready,
    Yielded,  // spins on memory: others go first
    Waiting,  // at a barrier, or for lanes of its own warp
  };
  int pc = 0;
  LaneMask lanes = 0;
  State state = State::Ready;
  bool gathering = false;  // Waiting for other lanes of its warp to come to the same instruction
};

class Warp {
 public:
  Warp(Block& block, const Program& program, int index, LaneMask live);
  Warp(const Warp&) = delete;
  Warp& operator=(const Warp&) = delete;

  // ---- registers
  // ----------------------------------------------------------------------------------
  template <class T>
  T* lanes(const Slot& slot) {
    return reinterpret_cast<T*>(values_ + slot.offset);
  }
  template <class T>
  const T* lanes(const Slot& slot) const {
    return reinterpret_cast<const T*>(values_ + slot.offset);
  }
  // Lane l's value, zero-extended from the slot's own width.
  uint64_t value(const Slot& slot, int lane) const;
  // The lanes in which some bit of the slot is undefined.
  LaneMask tainted(const Slot& slot) const { return taint_[slot.index]; }
  // The undefined bits of a lane (in T's width; 0 in a lane that is not tainted).
  template <class T>
  T undefined_of(const Slot& slot, int lane) const {
    if ((taint_[slot.index] & lane_bit(lane)) == 0) return T{0};
    T bits{0};
    std::memcpy(&bits, undefined_ + slot.offset + lane * slot.width,
                sizeof(T) < slot.width ? sizeof(T) : slot.width);
    return bits;
  }
  void set_undefined(const Slot& slot, int lane, uint64_t bits) {
    if (!slot.valid) return;
    if (bits == 0) {
      taint_[slot.index] &= ~lane_bit(lane);
      return;
    }
    taint_[slot.index] |= lane_bit(lane);
    std::memcpy(undefined_ + slot.offset + lane * slot.width, &bits, slot.width);
  }
  // Writes the active lanes, wholly defined. An invalid slot (`_`) swallows the value.
  template <class T>
  void store(const Slot& slot, const T* result, LaneMask active) {
    if (!slot.valid) return;
    T* d = lanes<T>(slot);
    if (active == kAllLanes) {
      std::memcpy(d, result, sizeof(T) * kLanes);
    } else {
      for (int l = 0; l < kLanes; ++l) d[l] = (active >> l & 1) != 0 ? result[l] : d[l];
    }
    taint_[slot.index] &= ~active;
    written_[slot.index] = serial_;
  }
  void store_lane(const Slot& slot, int lane, uint64_t value) {
    if (!slot.valid) return;
    std::memcpy(values_ + slot.offset + lane * slot.width, &value, slot.width);
    taint_[slot.index] &= ~lane_bit(lane);
    written_[slot.index] = serial_;
  }

  // A predicate register: bit l is lane l's. Its undefined lanes are its taint mask.
  LaneMask predicate(const Slot& slot) const { return *lanes<LaneMask>(slot); }
  void store_predicate(const Slot& slot, LaneMask value, LaneMask active, LaneMask undefined = 0) {
    if (!slot.valid) return;
    LaneMask* d = lanes<LaneMask>(slot);
    *d = (*d & ~active) | (value & active);
    taint_[slot.index] = (taint_[slot.index] & ~active) | (undefined & active);
    written_[slot.index] = serial_;
  }
  // The number of the instruction that wrote the slot last, and that of the one that runs: both
  // count the instructions of this warp.
  uint64_t written(const Slot& slot) const { return written_[slot.index]; }
  uint64_t serial() const { return serial_; }

  // ---- checks
  // ------------------------------------------------------------------------------------- Records a
  // finding at `step`, which `lane` ran; `offset` counts from the start of `buffer`, if any.
  void report(Check check, const Step& step, int lane, const std::string& message,
              const std::string& buffer = "", int64_t offset = 0);
  // "Uninitialised" when a lane of `lanes` is tainted in `slot`; `use` completes "... decides a
  // branch".
  void require_defined(const Step& step, const Slot& slot, LaneMask lanes, const char* use);

  // ---- control
  // ------------------------------------------------------------------------------------
  Block& block() { return block_; }
  const Block& block() const { return block_; }
  int index() const { return index_; }  // in its block
  int thread(int lane) const { return index_ * kLanes + lane; }
  LaneMask live() const { return live_; }       // not exited
  Group& group() { return groups_[current_]; }  // the one that runs

  // Handlers of Flow::Branch and Flow::Blocking move the program counter themselves.
  void jump(int pc) { group().pc = pc; }
  void advance() { ++group().pc; }
  void branch(LaneMask taken, int target);  // splits the group where its lanes disagree
  void exit(LaneMask lanes);
  // The running group stays at this instruction until `resume`, which sends its lanes on to the
  // next one.
  void wait() { group().state = Group::State::Waiting; }
  void resume(LaneMask lanes);
  void yield() { group().state = Group::State::Yielded; }
  // Gathers `members` in the running group, as .sync instructions demand. False where some are
  // still elsewhere: the group waits for them at this instruction, and the handler returns at once.
  // After true the handler works on group().lanes. Reports members that have exited or were not
  // named by all.
  bool gather(const Step& step, LaneMask members);
  // A strong or volatile load, or an atomic, ran: the second and later ones in a row at the same
  // place that see no change mean that the group spins, and let others go first.
  void polled(const Step& step, bool changed);

  enum class Outcome { Finished, Waiting, Yielded, Quantum };
  Outcome run(int quantum);
  const std::vector<Group>& groups() const { return groups_; }

  // ---- ordering
  // ----------------------------------------------------------------------------------- What each
  // lane knows of other threads' accesses (races/clock.h).
  Knowledge known[kLanes];
  // Stamps this warp's accesses; moves on at every release, so that later accesses are not covered.
  uint32_t epoch = 1;

  // wgmma: the serial of the last wgmma.fence, and what is in flight (tensor_core/wgmma).
  uint64_t wgmma_fence_serial = 0;
  std::shared_ptr<void> wgmma_queue;

 private:
  friend class Block;
  Group* pick();
  void merge();
  void split_off(LaneMask lanes, int pc);
  void set_specials();
  void tick();

  Block& block_;
  const Program& program_;
  int index_;
  LaneMask live_;
  std::vector<Group> groups_;
  size_t current_ = 0;
  std::vector<uint8_t> storage_;
  uint8_t* values_;
  uint8_t* undefined_;
  std::vector<LaneMask> taint_;
  std::vector<uint64_t> written_;
  uint64_t serial_ = 1;
  int polled_pc_ = -1;
  int polls_ = 0;
  std::vector<Slot> clocks_;  // special registers that tell the time
};

}  // namespace emulator
