#include "races/global_races.h"

#include "core/block.h"
#include "core/warp.h"

namespace emulator {

namespace {

// An access in 64 bits: block 20, agent 12, epoch 29, strong 1, bytes of the pair 2. Zero: none.
constexpr int kEpochBits = 29;

uint64_t pack(int block, int agent, uint32_t epoch, bool strong, unsigned bytes) {
  return (static_cast<uint64_t>(block) << 44) | (static_cast<uint64_t>(agent) << 32) |
         (static_cast<uint64_t>(epoch & ((1u << kEpochBits) - 1)) << 3) | (strong ? 4u : 0u) |
         bytes;
}
int block_of(uint64_t stamp) {
  return static_cast<int>(stamp >> 44);
}
int agent_of(uint64_t stamp) {
  return static_cast<int>(stamp >> 32 & 0xfff);
}
uint32_t epoch_of(uint64_t stamp) {
  return static_cast<uint32_t>(stamp >> 3) & ((1u << kEpochBits) - 1);
}
bool strong_of(uint64_t stamp) {
  return (stamp & 4) != 0;
}
unsigned bytes_of(uint64_t stamp) {
  return stamp & 3;
}

bool known(uint64_t stamp, const Warp& warp, int lane) {
  const int block = block_of(stamp), agent = agent_of(stamp);
  const ClockRef& ordered = warp.known[lane].ordered;
  if (block == warp.block().index()) {
    return agent == warp.thread(lane) || (ordered && ordered->at(agent) >= epoch_of(stamp));
  }
  return ordered && ordered->knows(block, agent, epoch_of(stamp));
}

}  // namespace

bool GlobalRaces::access(Page::Trace& trace, const Warp& warp, int lane, uint64_t offset, int bytes,
                         bool write, bool strong, bool same_value, Other* other) {
  bool fine = true;
  const int block = warp.block().index(), thread = warp.thread(lane);
  const uint64_t first = offset / 2, last = (offset + static_cast<uint64_t>(bytes) - 1) / 2;
  for (uint64_t pair = first; pair <= last; ++pair) {
    unsigned mask = 3;
    if (pair * 2 < offset) mask &= 2u;
    if (pair * 2 + 1 >= offset + static_cast<uint64_t>(bytes)) mask &= 1u;
    const uint64_t mine = pack(block, thread, warp.epoch, strong, mask);
    const auto conflicts = [&](uint64_t stamp, bool stamp_writes) {
      if (stamp == 0 || (bytes_of(stamp) & mask) == 0 || (strong && strong_of(stamp)) ||
          known(stamp, warp, lane)) {
        return false;
      }
      const bool same_warp = block_of(stamp) == block && agent_of(stamp) / kLanes == warp.index();
      if (same_value && stamp_writes && same_warp && epoch_of(stamp) == warp.epoch) return false;
      if (fine) *other = {block_of(stamp), agent_of(stamp), stamp_writes};
      fine = false;
      return true;
    };
    uint64_t& writer = trace.writer[pair];
    auto& readers = trace.readers[pair];
    if (writer == mine && write) continue;
    conflicts(writer, true);
    if (write) {
      if (!conflicts(readers[0], false)) conflicts(readers[1], false);
      writer = mine;
      readers = {0, 0};
      continue;
    }
    if (readers[0] == mine || readers[1] == mine) continue;
    // A reader that this one is ordered after is subsumed by it. Of several unordered readers two
    // are kept: enough to see that a write by anybody races, unless it is ordered after just these
    // two; the other order of the blocks then shows it as a read after a write.
    if (readers[0] == 0 || known(readers[0], warp, lane)) {
      readers[0] = mine;
    } else if (readers[1] == 0 || known(readers[1], warp, lane) ||
               block_of(readers[1]) == block_of(readers[0])) {
      readers[1] = mine;
    }
  }
  return fine;
}

uint64_t GlobalRaces::key(uint64_t address, const Warp& warp, bool block_scope) {
  // Addresses have 48 bits; a block's own publications get keys of their own.
  return block_scope ? address | static_cast<uint64_t>(warp.block().index() + 1) << 48 : address;
}

void GlobalRaces::publish(uint64_t address, Warp& warp, int lane, const Ordering& ordering) {
  Clock clock;
  if (ordering.release) {
    clock = with_own(warp.known[lane].ordered, warp, lane_bit(lane));
    ++warp.epoch;
  } else if (warp.known[lane].fenced) {
    clock = *warp.known[lane].fenced;
  } else {
    return;
  }
  clock.others[warp.block().index()] = std::make_shared<const Epochs>(std::move(clock.own));
  clock.own.clear();
  for (const bool block_scope : {true, false}) {
    if (!block_scope && ordering.block_scope) continue;
    ClockRef& at = published_[key(address, warp, block_scope)];
    at = join(at, std::make_shared<const Clock>(clock));
  }
}

void GlobalRaces::observe(uint64_t address, Warp& warp, int lane, const Ordering& ordering) {
  if (published_.empty()) return;
  for (const bool block_scope : {true, false}) {
    if (!block_scope && ordering.block_scope) continue;
    const auto found = published_.find(key(address, warp, block_scope));
    if (found == published_.end()) continue;
    Clock seen = *found->second;
    const auto own = seen.others.find(warp.block().index());
    if (own != seen.others.end()) {
      seen.own = *own->second;
      seen.others.erase(own);
    }
    ClockRef& into = ordering.acquire ? warp.known[lane].ordered : warp.known[lane].pending;
    into = join(into, std::make_shared<const Clock>(std::move(seen)));
  }
}

void GlobalRaces::fence(Warp& warp, LaneMask lanes) {
  ClockRef before, pending, after;
  bool any = false;
  for_each_lane(lanes, [&](int l) {
    Knowledge& known = warp.known[l];
    if (!any || known.ordered != before || known.pending != pending) {
      before = known.ordered;
      pending = known.pending;
      after = join(known.ordered, known.pending);
      any = true;
    }
    known.ordered = after;
    known.fenced =
        std::make_shared<const Clock>(with_own(join(known.fenced, after), warp, lane_bit(l)));
  });
  ++warp.epoch;
}

}  // namespace emulator
