// Races in global memory, between blocks too, and the release and acquire that order them.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "common/lanes.h"
#include "core/step.h"
#include "memory/allocation.h"
#include "races/clock.h"

namespace emulator {

class Warp;

// Scope and strength of a memory operation (PTX ISA, "Memory Consistency Model").
struct Ordering {
  bool strong = false;  // volatile, relaxed, acquire, release and atomics
  bool acquire = false;
  bool release = false;
  bool block_scope = false;  // .cta: means nothing to other blocks
};

class GlobalRaces {
 public:
  // Records an access of a lane to bytes of one page; false when it races: `other` says with whom.
  // `same_value`: a store of what is there already, which lanes of one instruction may do at once.
  struct Other {
    int block, agent;
    bool write;
  };
  bool access(Page::Trace& trace, const Warp& warp, int lane, uint64_t offset, int bytes,
              bool write, bool strong, bool same_value, Other* other);

  // A strong store or an atomic by a lane published what the lane knows (all of it when it
  // releases, else what its last device fence covered) ...
  void publish(uint64_t address, Warp& warp, int lane, const Ordering& ordering);
  // ... and a strong load or an atomic saw it: at once when it acquires, else at the lane's next
  // fence.
  void observe(uint64_t address, Warp& warp, int lane, const Ordering& ordering);
  static void fence(Warp& warp, LaneMask lanes);

 private:
  static uint64_t key(uint64_t address, const Warp& warp, bool block_scope);
  // What was published at an address; `own` is empty, every block is among the others.
  std::unordered_map<uint64_t, ClockRef> published_;
};

}  // namespace emulator
