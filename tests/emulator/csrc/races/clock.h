// Vector clocks: what a thread knows of the accesses of others.
//
// Every access is stamped with its warp's epoch. A release by a lane publishes "all my accesses up
// to this epoch, and all that I know of others", and moves the warp's epoch on; an acquire joins
// what was published. An access is ordered before another when the thread of the second knows the
// first's epoch (Fidge and Mattern's clocks, with FastTrack's epochs for the accesses).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "common/lanes.h"

namespace emulator {

class Warp;

// An agent is a thread of a block, or one of the block's asynchronous agents (bulk copies that
// signal one mbarrier), numbered after the threads.
using Epochs = std::vector<uint32_t>;  // by agent; agents past its end: 0
using EpochsRef = std::shared_ptr<const Epochs>;

struct Clock {
  Epochs own;                       // of the block that the clock belongs to
  std::map<int, EpochsRef> others;  // of other blocks, by their linear index

  uint32_t at(int agent) const {
    return agent < static_cast<int>(own.size()) ? own[static_cast<size_t>(agent)] : 0;
  }
  bool knows(int block, int agent, uint32_t epoch) const;  // of another block
  void raise(int agent, uint32_t epoch);
  void join(const Clock& other);
};
using ClockRef = std::shared_ptr<const Clock>;

// A lane's.
struct Knowledge {
  ClockRef ordered;  // what happened before
  ClockRef proxied;  // of it, what the async proxy sees too (fence.proxy.async)
  ClockRef fenced;   // what a relaxed atomic of this lane publishes: its knowledge at its last
                     // device fence
  ClockRef pending;  // what its relaxed loads saw published; a device fence acquires it
};

// The join of knowledge that gathers at a barrier.
struct Gathered {
  Clock ordered, proxied, fenced, pending;
  void add(Warp& warp, LaneMask lanes);  // a release by these lanes; the caller then ends the epoch
  void clear() { *this = Gathered{}; }
};
struct GatheredRef {
  explicit GatheredRef(const Gathered& from);
  GatheredRef() = default;
  void give(Warp& warp, LaneMask lanes) const;  // replaces: after a barrier everyone knows the same
  void acquire(Warp& warp, LaneMask lanes) const;  // joins
  ClockRef ordered, proxied, fenced, pending;
};

ClockRef join(const ClockRef& a, const ClockRef& b);  // either may be null
// What the lane knows, its own accesses up to now included; the caller then ends the warp's epoch.
Clock with_own(const ClockRef& known, const Warp& warp, LaneMask lanes);

}  // namespace emulator
