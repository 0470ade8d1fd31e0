#include "core/block.h"

#include <algorithm>

#include "core/launch.h"

namespace emulator {

namespace {

// Polls in vain, since memory changed last, after which other blocks get a turn: threads may spin
// together, through the block's barriers, which alone would look like progress.
constexpr int kVainPolls = 64;

// Steps that a warp runs before others of its block get a turn: long, for the host's caches.
constexpr int kQuantum = 4096;

std::vector<SharedMemory::Variable> shared_variables(const Program& program) {
  std::vector<SharedMemory::Variable> variables = program.shared_variables;
  if (!program.dynamic_shared_name.empty()) {
    variables.push_back(
        {kSharedBase + program.dynamic_shared_offset, 0, program.dynamic_shared_name});
  }
  return variables;
}

}  // namespace

Block::Block(Launch& launch, int index)
    : launch_(launch),
      program_(launch.program),
      index_(index),
      threads_(launch.threads()),
      shared_(launch.program.dynamic_shared_offset + launch.shape.dynamic_shared_bytes,
              shared_variables(launch.program)),
      local_(size_t{launch.program.local_bytes} * static_cast<size_t>(threads_)),
      local_undefined_(local_.size(), 0xff) {
  const uint32_t* grid = launch.shape.grid;
  const auto at = static_cast<uint32_t>(index);
  coordinates_[0] = static_cast<int>(at % grid[0]);
  coordinates_[1] = static_cast<int>(at / grid[0] % grid[1]);
  coordinates_[2] = static_cast<int>(at / grid[0] / grid[1]);
  async.copies.resize(static_cast<size_t>(threads_));
  async.bulk_groups.resize(static_cast<size_t>(threads_));
  for (int first = 0; first < threads_; first += kLanes) {
    const int lanes = std::min(kLanes, threads_ - first);
    const LaneMask live = lanes == kLanes ? kAllLanes : lane_bit(lanes) - 1;
    warps_.push_back(std::make_unique<Warp>(*this, program_, first / kLanes, live));
  }
}

const Settings& Block::settings() const {
  return launch_.machine.settings;
}
const Limits& Block::limits() const {
  return launch_.machine.limits;
}
Counters& Block::counters() {
  return launch_.record.counters;
}

int Block::new_agent() {
  async.agent_epochs.push_back(0);
  return first_agent() + static_cast<int>(async.agent_epochs.size()) - 1;
}

void Block::learn(Warp& warp, LaneMask lanes, int agent, uint32_t epoch) {
  ClockRef before, after;
  bool any = false;
  for_each_lane(lanes, [&](int l) {
    ClockRef& ordered = warp.known[l].ordered;
    if (!any || ordered != before) {
      before = ordered;
      Clock clock = ordered ? *ordered : Clock{};
      clock.raise(agent, epoch);
      after = std::make_shared<const Clock>(std::move(clock));
      any = true;
    }
    ordered = after;
  });
}

void Block::complete(NamedBarrier& barrier) {
  const GatheredRef known(barrier.gathered);
  const std::vector<NamedBarrier::Waiter> waiters = std::move(barrier.waiters);
  const NamedBarrier done = barrier;
  barrier = NamedBarrier{};
  for (const NamedBarrier::Waiter& waiter : waiters) {
    known.give(*waiter.warp, waiter.lanes);
    if (waiter.finish != nullptr) waiter.finish(*waiter.warp, *waiter.step, waiter.lanes, done);
    waiter.warp->resume(waiter.lanes);
  }
  progressed();
}

// Bulk copies land as late as they may: when nothing else in the block can go on. With the blocks
// in reverse order they land in reverse too, for nothing orders one before another.
bool Block::land_bulk_copy() {
  if (async.bulk.empty()) return false;
  BulkCopy copy;
  if (settings().order == Order::Reverse) {
    copy = std::move(async.bulk.back());
    async.bulk.pop_back();
  } else {
    copy = std::move(async.bulk.front());
    async.bulk.pop_front();
  }
  copy.land();
  changed();
  return true;
}

// A bulk store that nobody waited for still reads the block's shared memory, which is gone with its
// threads.
void Block::finish_bulk_stores() {
  for (ThreadBulkGroups& mine : async.bulk_groups) {
    for (const auto& group : mine.groups) {
      for (const auto& land : group) land(false);
    }
    for (const auto& land : mine.open) land(false);
  }
}

// The hardware counts exited threads as arrived; the ISA promises nothing of the kind.
bool Block::release_past_exited() {
  int alive = 0;
  for (const auto& warp : warps_) alive += count(warp->live());
  for (NamedBarrier& barrier : barriers) {
    if (barrier.waiters.empty() || barrier.counted || barrier.arrived < alive) continue;
    const NamedBarrier::Waiter& first = barrier.waiters.front();
    first.warp->report(Check::Barrier, *first.step, first_lane(first.lanes),
                       std::to_string(threads_ - alive) + " of the block's " +
                           std::to_string(threads_) +
                           " threads have exited and never come to this barrier");
    complete(barrier);
    return true;
  }
  return false;
}

Block::Outcome Block::run() {
  const uint64_t limit = settings().max_instructions;
  while (true) {
    const uint64_t before = progress_;
    bool finished = true, ran_out = false, yielded = false;
    for (size_t i = 0; i < warps_.size(); ++i) {
      Warp& warp = *warps_[settings().order == Order::Reverse ? warps_.size() - 1 - i : i];
      switch (warp.run(kQuantum)) {
        case Warp::Outcome::Finished:
          continue;
        case Warp::Outcome::Quantum:
          ran_out = true;
          break;
        case Warp::Outcome::Yielded:
          yielded = true;
          break;
        case Warp::Outcome::Waiting:
          break;
      }
      finished = false;
      if (limit != 0 && warp.serial() > limit) {
        report_stuck("did not end within the limit of instructions");
        throw LaunchEnd("a warp ran " + std::to_string(limit) + " instructions and did not end");
      }
    }
    if (finished) {
      finish_bulk_stores();
      return Outcome::Finished;
    }
    if (vain_polls_ > kVainPolls) {
      vain_polls_ = 0;
      return Outcome::Idle;
    }
    if (ran_out || progress_ != before) continue;
    if (land_bulk_copy() || release_past_exited()) continue;
    return yielded ? Outcome::Idle : Outcome::Stuck;
  }
}

std::string Block::describe_waiting() const {
  std::string text;
  for (const auto& warp : warps_) {
    for (const Group& group : warp->groups()) {
      const ptx::Instruction& at = *program_.steps[static_cast<size_t>(group.pc)].source;
      char lanes[16];
      std::snprintf(lanes, sizeof lanes, "%08x", group.lanes);
      if (!text.empty()) text += "; ";
      text += "warp " + std::to_string(warp->index()) + " lanes " + lanes + " at PTX line " +
              std::to_string(at.at.ptx_line) + " `" + at.text.substr(0, 60) + "`";
    }
  }
  return text;
}

void Block::report_stuck(const char* why) {
  const std::string all = describe_waiting();
  for (const auto& warp : warps_) {
    for (const Group& group : warp->groups()) {
      const Step& step = program_.steps[static_cast<size_t>(group.pc)];
      if (group.gathering) {
        warp->report(Check::Barrier, step, first_lane(group.lanes),
                     "divergent: these lanes wait for others of their warp that never come here (" +
                         all + ")");
      } else {
        warp->report(Check::Deadlock, step, first_lane(group.lanes),
                     std::string(why) + " (" + all + ")");
      }
    }
  }
}

}  // namespace emulator
