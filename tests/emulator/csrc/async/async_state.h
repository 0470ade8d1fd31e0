// What is under way in a block: cp.async groups, bulk copies, and the mbarriers that they signal.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#include "races/clock.h"

namespace emulator {

// One lane's cp.async: the bytes were read at its issue, and are written when the lane waits for
// its group, which is as late as the ISA allows.
struct AsyncCopy {
  uint32_t address;
  uint32_t bytes;
  uint32_t ticket;  // SharedRaces
  uint8_t value[16];
  uint8_t undefined[16];
};

struct ThreadCopies {
  std::vector<AsyncCopy> open;  // not committed yet
  std::deque<std::vector<AsyncCopy>> groups;
};

// An mbarrier object (PTX ISA, "Parallel Synchronization and Communication Instructions:
// mbarrier"). Its state is kept here; the eight bytes in shared memory are opaque to the program.
struct MBarrier {
  uint32_t expected = 0;
  uint32_t pending = 0;
  int64_t transactions = 0;  // bytes expected less bytes that arrived
  uint64_t phase = 0;        // of the current, incomplete phase
  Gathered gathering;        // of the current phase
  GatheredRef completed;     // of the phase before
  int agent = 0;             // the asynchronous agent of the bulk copies that signal this mbarrier
  // Who initialised it: the async proxy must have been told by a fence.
  int initialised_by = 0;
  uint32_t initialised_at = 0;
};

// A bulk copy between its issue and its landing.
struct BulkCopy {
  std::function<void()> land;
};

// The bulk stores of one thread, which it waits for by groups. The argument: somebody waited.
using BulkStore = std::function<void(bool)>;
struct ThreadBulkGroups {
  std::vector<BulkStore> open;
  std::deque<std::vector<BulkStore>> groups;
};

struct AsyncState {
  std::vector<ThreadCopies> copies;           // by thread
  std::vector<ThreadBulkGroups> bulk_groups;  // by thread
  std::map<uint32_t, MBarrier> mbarriers;     // by shared address
  std::deque<BulkCopy> bulk;                  // in the order of issue
  std::vector<uint32_t> agent_epochs;         // of the asynchronous agents
};

}  // namespace emulator
