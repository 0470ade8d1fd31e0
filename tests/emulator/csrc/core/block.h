// A block of threads: its warps, its shared and local memory, its barriers, and what is under way
// in it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "async/async_state.h"
#include "core/program.h"
#include "core/warp.h"
#include "counters/counters.h"
#include "memory/shared_memory.h"
#include "races/clock.h"

namespace emulator {

class Launch;
struct Settings;
struct Limits;

// One of the sixteen named barriers of a block (PTX ISA, "bar").
struct NamedBarrier {
  int expected = 0;      // threads; 0: nobody has come yet
  bool counted = false;  // the program said how many
  int arrived = 0;
  Gathered gathered;
  // Of bar.red: over all threads that arrived.
  bool reduced_and = true, reduced_or = false;
  int reduced_count = 0;
  struct Waiter {
    Warp* warp;
    const Step* step;
    LaneMask lanes;
    // Runs when the barrier is complete, before the lanes go on; may be null.
    void (*finish)(Warp&, const Step&, LaneMask, const NamedBarrier&);
  };
  std::vector<Waiter> waiters;
};

// barrier.cluster of a cluster of one block: threads arrive and wait apart, phase after phase.
struct ClusterBarrier {
  int arrived = 0;         // in the current phase
  uint32_t completed = 0;  // phases
  Gathered gathering;
  GatheredRef known;            // of the phase completed last
  std::vector<uint32_t> waits;  // by thread: how many phases it has waited for
  struct Waiter {
    Warp* warp;
    LaneMask lanes;
    uint32_t phase;
  };
  std::vector<Waiter> waiters;
};

class Block {
 public:
  static constexpr int kBarriers = 16;

  Block(Launch& launch, int index);

  Launch& launch() { return launch_; }
  const Settings& settings() const;
  const Limits& limits() const;
  Counters& counters();
  SharedMemory& shared() { return shared_; }
  const SharedMemory& shared() const { return shared_; }
  const Program& program() const { return program_; }
  int index() const { return index_; }  // linear, in the grid
  const int* coordinates() const { return coordinates_; }
  int threads() const { return threads_; }
  int warps() const { return static_cast<int>(warps_.size()); }
  Warp& warp(int i) { return *warps_[static_cast<size_t>(i)]; }

  // A thread's local memory: values, and 0xff for each undefined byte.
  uint8_t* local(int thread) { return local_.data() + size_t{program_.local_bytes} * thread; }
  uint8_t* local_undefined(int thread) {
    return local_undefined_.data() + size_t{program_.local_bytes} * thread;
  }

  NamedBarrier barriers[kBarriers];
  ClusterBarrier cluster_barrier;
  AsyncState async;

  // Asynchronous agents (races/clock.h) are numbered from here on.
  int first_agent() const { return warps() * kLanes; }
  int new_agent();
  // The agent has done something more; its epoch, which covers all of it so far.
  uint32_t advance(int agent) {
    return ++async.agent_epochs[static_cast<size_t>(agent - first_agent())];
  }
  uint32_t epoch_of(int agent) const {
    return async.agent_epochs[static_cast<size_t>(agent - first_agent())];
  }
  // The lanes learn of all that the agent did up to `epoch`.
  static void learn(Warp& warp, LaneMask lanes, int agent, uint32_t epoch);

  // Lanes of this block woke or moved on.
  void progressed() { ++progress_; }
  // Memory changed, or threads ended: what somebody may be polling for, in other blocks too.
  void changed() {
    ++progress_;
    ++changes_;
    vain_polls_ = 0;
  }
  uint64_t changes() const { return changes_; }
  // A strong load saw what it had seen before.
  void polled_in_vain() { ++vain_polls_; }

  // Releases a barrier at which enough threads have arrived.
  void complete(NamedBarrier& barrier);

  enum class Outcome { Finished, Idle, Stuck };
  // Runs until all threads have exited, or nothing can go on without other blocks (Idle: some warp
  // spins; Stuck: none does, the block waits for itself).
  Outcome run();
  // "warp 3 lanes 0xffffffff wait at line 120 `bar.sync 1, 64`; ..."
  std::string describe_waiting() const;
  // Reports a deadlock at each place where lanes wait.
  void report_stuck(const char* why);

 private:
  bool land_bulk_copy();
  void finish_bulk_stores();
  bool release_past_exited();

  Launch& launch_;
  const Program& program_;
  int index_;
  int coordinates_[3];
  int threads_;
  SharedMemory shared_;
  std::vector<uint8_t> local_, local_undefined_;
  std::vector<std::unique_ptr<Warp>> warps_;
  uint64_t progress_ = 0;
  uint64_t changes_ = 0;
  int vain_polls_ = 0;
};

}  // namespace emulator
