#include "races/shared_races.h"

#include <algorithm>

#include "core/block.h"
#include "core/launch.h"
#include "core/warp.h"
#include "memory/shared_memory.h"

namespace emulator {

SharedRaces::SharedRaces(uint32_t base, uint32_t bytes) : base_(base), words_((bytes + 3) / 4) {}

SharedRaces::Entry& SharedRaces::entry(Word& word, uint32_t i) {
  return i < Word::kInline ? word.entries[i] : (*word.more)[i - Word::kInline];
}

void SharedRaces::push(Word& word, const Entry& entry) {
  if (word.count < Word::kInline) {
    word.entries[word.count] = entry;
  } else {
    if (!word.more) word.more = std::make_unique<std::vector<Entry>>();
    word.more->push_back(entry);
  }
  ++word.count;
}

void SharedRaces::remove(Word& word, uint32_t i) {
  --word.count;
  if (i != word.count) entry(word, i) = entry(word, word.count);
  if (word.count >= Word::kInline) word.more->pop_back();
}

// Calls `visit(word, bytes of the word as a mask, the word's address)`.
template <class Visit>
void SharedRaces::for_each_word(uint32_t address, uint32_t bytes, Visit visit) {
  uint32_t at = address - base_;
  const uint32_t end = at + bytes;
  while (at < end) {
    const uint32_t within = at % 4;
    const uint32_t piece = std::min(4 - within, end - at);
    visit(words_[at / 4], static_cast<uint8_t>(((1u << piece) - 1) << within), base_ + at);
    at += piece;
  }
}

bool SharedRaces::is_known(const Entry& entry, const Access& access) const {
  if (entry.epoch == kUnderWay) return false;
  const Warp& warp = *access.warp;
  LaneMask others = entry.lanes;
  if (entry.warp == warp.index()) others &= ~lane_bit(access.lane);
  if (others == 0) return true;
  const ClockRef& ordered = warp.known[access.lane].ordered;
  if (!ordered) return false;
  bool known = true;
  for_each_lane(
      others, [&](int l) { known = known && ordered->at(entry.warp * kLanes + l) >= entry.epoch; });
  return known;
}

// Whether what ordinary instructions did is ordered for the async proxy too: some thread that knew
// of it ran fence.proxy.async, and this one knows of that.
bool SharedRaces::is_proxied(const Entry& entry, const Access& access) const {
  const ClockRef& proxied = access.warp->known[access.lane].proxied;
  if (!proxied) return false;
  bool known = true;
  for_each_lane(entry.lanes, [&](int l) {
    known = known && proxied->at(entry.warp * kLanes + l) >= entry.epoch;
  });
  return known;
}

void SharedRaces::report(const Entry& entry, const Access& access, uint32_t address, bool proxy) {
  Warp& warp = *access.warp;
  const Check check = entry.epoch == kUnderWay ? Check::Asynchronous
                      : proxy                  ? Check::Proxy
                                               : Check::Race;
  // A missing wait is found at every word of a tile: only the first is put into words.
  if (warp.block().launch().repeats(check, access.step->source->at.ptx_line)) return;
  const Step& other = warp.block().program().steps[static_cast<size_t>(entry.pc)];
  const int thread = entry.warp * kLanes + first_lane(entry.lanes);
  std::string who = "thread " + std::to_string(thread);
  if (thread >= warp.block().first_agent()) who = "an asynchronous operation";
  const std::string what = std::string(access.write ? "writes " : "reads ") +
                           warp.block().shared().describe(address) + ", which " + who +
                           (entry.write ? " wrote" : " read");
  const std::string where =
      " at PTX line " + std::to_string(other.source->at.ptx_line) + " `" + other.source->text + "`";
  if (entry.epoch == kUnderWay) {
    const std::string verb = entry.write ? " is still writing" : " is still reading";
    const std::string asynchronously = " asynchronously";
    warp.report(check, *access.step, access.lane,
                std::string(access.write ? "writes " : "reads ") +
                    warp.block().shared().describe(address) + ", which " + who + verb +
                    asynchronously + where);
  } else if (proxy) {
    warp.report(check, *access.step, access.lane,
                "the async proxy " + what + " with ordinary instructions" + where +
                    ": no fence.proxy.async orders them");
  } else {
    warp.report(check, *access.step, access.lane, what + where + ": nothing orders them");
  }
}

// Checks an access against one that overlaps it. True when the new one makes the old one
// superfluous: whatever will be ordered after the new one is then ordered after the old one too.
bool SharedRaces::supersedes(const Entry& old, uint8_t bytes, const Access& access,
                             uint32_t address) {
  const bool conflict = (old.write || access.write) && !(old.atomic && access.atomic);
  const bool known = is_known(old, access);
  if (conflict && !known) {
    report(old, access, address, false);
    return old.epoch != kUnderWay;  // once is enough
  }
  if (access.async_proxy && !old.async_proxy && old.write && !is_proxied(old, access)) {
    report(old, access, address, true);
  }
  // Another atomic would conflict with an ordinary access, an mbarrier's initialisation for
  // example, but not with the atomic that took its place.
  return known && (old.bytes & ~bytes) == 0 && (access.write || !old.write) &&
         (old.atomic || !access.atomic);
}

void SharedRaces::touch(Word& word, uint8_t bytes, const Access& access, uint32_t address,
                        uint32_t ticket) {
  const Warp& warp = *access.warp;
  bool recorded = false;
  for (uint32_t i = 0; i < word.count;) {
    Entry& old = entry(word, i);
    const bool overlaps = (old.bytes & bytes) != 0;
    const bool mergeable = ticket == 0 && old.ticket == 0 && old.bytes == bytes &&
                           old.warp == warp.index() && old.epoch == warp.epoch &&
                           old.write == access.write && old.atomic == access.atomic &&
                           old.async_proxy == access.async_proxy &&
                           (!old.write || old.atomic || old.lanes == lane_bit(access.lane) ||
                            (access.same_value && old.pc == access.step->pc));
    if (mergeable) {
      old.lanes |= lane_bit(access.lane);
      old.pc = access.step->pc;
      recorded = true;
    } else if (overlaps && supersedes(old, bytes, access, address)) {
      remove(word, i);
      continue;
    }
    ++i;
  }
  if (recorded) return;
  Entry mine{};
  mine.epoch = ticket == 0 ? warp.epoch : kUnderWay;
  mine.lanes = lane_bit(access.lane);
  mine.pc = access.step->pc;
  mine.ticket = ticket;
  mine.warp = static_cast<uint16_t>(warp.index());
  mine.bytes = bytes;
  mine.write = access.write;
  mine.async_proxy = access.async_proxy;
  mine.atomic = access.atomic;
  push(word, mine);
}

void SharedRaces::access(const Access& access) {
  for_each_word(access.address, access.bytes,
                [&](Word& word, uint8_t bytes, uint32_t at) { touch(word, bytes, access, at, 0); });
}

uint32_t SharedRaces::begin(const Access& access) {
  uint32_t ticket;
  if (free_tickets_.empty()) {
    under_way_.emplace_back();
    ticket = static_cast<uint32_t>(under_way_.size());
  } else {
    ticket = free_tickets_.back();
    free_tickets_.pop_back();
  }
  under_way_[ticket - 1] = {access.address, access.bytes};
  for_each_word(access.address, access.bytes, [&](Word& word, uint8_t bytes, uint32_t at) {
    touch(word, bytes, access, at, ticket);
  });
  return ticket;
}

template <class Change>
void SharedRaces::end(uint32_t ticket, Change change) {
  const Range range = under_way_[ticket - 1];
  for_each_word(range.address, range.bytes, [&](Word& word, uint8_t, uint32_t) {
    for (uint32_t i = 0; i < word.count; ++i) {
      Entry& e = entry(word, i);
      if (e.ticket == ticket) {
        e.ticket = 0;
        change(e);
      }
    }
  });
  free_tickets_.push_back(ticket);
}

void SharedRaces::end_by_lane(Warp& warp, int lane, uint32_t ticket) {
  end(ticket, [&](Entry& e) {
    e.epoch = warp.epoch;
    e.warp = static_cast<uint16_t>(warp.index());
    e.lanes = lane_bit(lane);
  });
}

void SharedRaces::end_by_agent(int agent, uint32_t epoch, uint32_t ticket) {
  end(ticket, [&](Entry& e) {
    e.epoch = epoch;
    e.warp = static_cast<uint16_t>(agent / kLanes);
    e.lanes = lane_bit(agent % kLanes);
  });
}

}  // namespace emulator
