#include "races/clock.h"

#include <algorithm>

#include "core/warp.h"

namespace emulator {

namespace {

void join_epochs(Epochs* into, const Epochs& from) {
  if (into->size() < from.size()) into->resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) (*into)[i] = std::max((*into)[i], from[i]);
}

// Calls `visit` once for each distinct clock among the lanes': lanes of a warp mostly share one.
template <class Visit>
void for_each_distinct(const Warp& warp, LaneMask lanes, ClockRef Knowledge::* member,
                       Visit visit) {
  const Clock* last = nullptr;
  for_each_lane(lanes, [&](int l) {
    const ClockRef& clock = warp.known[l].*member;
    if (clock && clock.get() != last) {
      visit(*clock);
      last = clock.get();
    }
  });
}

}  // namespace

bool Clock::knows(int block, int agent, uint32_t epoch) const {
  const auto found = others.find(block);
  return found != others.end() && agent < static_cast<int>(found->second->size()) &&
         (*found->second)[static_cast<size_t>(agent)] >= epoch;
}

void Clock::raise(int agent, uint32_t epoch) {
  if (agent >= static_cast<int>(own.size())) own.resize(static_cast<size_t>(agent) + 1, 0);
  own[static_cast<size_t>(agent)] = std::max(own[static_cast<size_t>(agent)], epoch);
}

void Clock::join(const Clock& other) {
  join_epochs(&own, other.own);
  for (const auto& [block, epochs] : other.others) {
    EpochsRef& mine = others[block];
    if (mine == epochs) continue;
    if (!mine) {
      mine = epochs;
      continue;
    }
    Epochs joined = *mine;
    join_epochs(&joined, *epochs);
    mine = std::make_shared<const Epochs>(std::move(joined));
  }
}

ClockRef join(const ClockRef& a, const ClockRef& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  Clock joined = *a;
  joined.join(*b);
  return std::make_shared<const Clock>(std::move(joined));
}

Clock with_own(const ClockRef& known, const Warp& warp, LaneMask lanes) {
  Clock clock = known ? *known : Clock{};
  for_each_lane(lanes, [&](int l) { clock.raise(warp.thread(l), warp.epoch); });
  return clock;
}

void Gathered::add(Warp& warp, LaneMask lanes) {
  for_each_distinct(warp, lanes, &Knowledge::ordered, [&](const Clock& c) { ordered.join(c); });
  for_each_lane(lanes, [&](int l) { ordered.raise(warp.thread(l), warp.epoch); });
  for_each_distinct(warp, lanes, &Knowledge::proxied, [&](const Clock& c) { proxied.join(c); });
  for_each_distinct(warp, lanes, &Knowledge::fenced, [&](const Clock& c) { fenced.join(c); });
  for_each_distinct(warp, lanes, &Knowledge::pending, [&](const Clock& c) { pending.join(c); });
}

GatheredRef::GatheredRef(const Gathered& from)
    : ordered(std::make_shared<const Clock>(from.ordered)),
      proxied(std::make_shared<const Clock>(from.proxied)),
      fenced(std::make_shared<const Clock>(from.fenced)),
      pending(std::make_shared<const Clock>(from.pending)) {}

void GatheredRef::give(Warp& warp, LaneMask lanes) const {
  for_each_lane(lanes, [&](int l) { warp.known[l] = {ordered, proxied, fenced, pending}; });
}

void GatheredRef::acquire(Warp& warp, LaneMask lanes) const {
  // Lanes that knew the same before know the same after: one join serves them all.
  Knowledge before, after;
  bool any = false;
  for_each_lane(lanes, [&](int l) {
    Knowledge& known = warp.known[l];
    if (!any || known.ordered != before.ordered || known.proxied != before.proxied ||
        known.fenced != before.fenced || known.pending != before.pending) {
      before = known;
      after = {join(known.ordered, ordered), join(known.proxied, proxied),
               join(known.fenced, fenced), join(known.pending, pending)};
      any = true;
    }
    known = after;
  });
}

}  // namespace emulator
