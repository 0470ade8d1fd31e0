// What the lanes of a warp tell one another: shfl, vote, match, redux, elect, activemask, and
// bar.warp.sync. Each names the lanes that take part; they are gathered here, wherever they come
// from.
#include <algorithm>

#include "core/binder.h"
#include "core/block.h"
#include "core/warp.h"
#include "races/clock.h"

namespace emulator {

namespace {

using ptx::Type;

const Type kB32{Type::Class::Bits, 32, 1};
const Type kPredicate{Type::Class::Predicate, 0, 1};

// The member mask of the running group: all of its lanes must give the same, and be in it.
LaneMask members_of(Warp& warp, const Step& step, const Slot& slot) {
  const LaneMask lanes = warp.group().lanes;
  warp.require_defined(step, slot, lanes, "is used as a member mask");
  const auto members = static_cast<LaneMask>(warp.value(slot, first_lane(lanes)));
  LaneMask strangers = lanes & ~members;
  for_each_lane(lanes, [&](int l) {
    if (static_cast<LaneMask>(warp.value(slot, l)) != members) strangers |= lane_bit(l);
  });
  if (strangers != 0) {
    warp.report(Check::Convergence, step, first_lane(strangers),
                "the lanes here do not agree on the member mask, or are not in it");
  }
  return members;
}

// True when the members are together; the handler then works on group().lanes.
bool together(Warp& warp, const Step& step, const Slot& members) {
  return warp.gather(step, members_of(warp, step, members));
}

// ---- shfl.sync.mode.b32 d|p, a, b, c, mask
// -------------------------------------------------------------

enum class Shuffle { Up, Down, Butterfly, Index };

// slots: d, p, a, b, c, mask.
template <Shuffle mode>
void run_shfl(Warp& warp, const Step& step, LaneMask) {
  if (!together(warp, step, step.slots[5])) return;
  const LaneMask active = warp.group().lanes;
  const Slot &d = step.slots[0], &p = step.slots[1], &a = step.slots[2], &b = step.slots[3],
             &c = step.slots[4];
  warp.require_defined(step, b, active, "chooses a lane");
  warp.require_defined(step, c, active, "clamps a lane");
  uint32_t result[kLanes] = {}, unknown[kLanes] = {};
  LaneMask valid = 0;
  for_each_lane(active, [&](int l) {
    const auto lane = static_cast<uint32_t>(l);
    const auto by = static_cast<uint32_t>(warp.value(b, l)) & 31;
    const auto control = static_cast<uint32_t>(warp.value(c, l));
    const uint32_t segment = control >> 8 & 31, clamp = control & 31;
    const uint32_t max_lane = (lane & segment) | (clamp & ~segment);
    const uint32_t min_lane = lane & segment;
    uint32_t from = 0;
    bool in = false;
    if (mode == Shuffle::Up) {
      from = lane - by;
      in = static_cast<int32_t>(from) >= static_cast<int32_t>(max_lane);
    } else if (mode == Shuffle::Down) {
      from = lane + by;
      in = from <= max_lane;
    } else if (mode == Shuffle::Butterfly) {
      from = lane ^ by;
      in = from <= max_lane;
    } else {
      from = min_lane | (by & ~segment);
      in = from <= max_lane;
    }
    if (!in) from = lane;
    if (in) valid |= lane_bit(l);
    if ((active & lane_bit(static_cast<int>(from))) == 0) {
      warp.report(Check::Convergence, step, l,
                  "takes a value from lane " + std::to_string(from) + ", which takes no part");
    }
    result[l] = static_cast<uint32_t>(warp.value(a, static_cast<int>(from)));
    unknown[l] = warp.undefined_of<uint32_t>(a, static_cast<int>(from));
  });
  warp.store(d, result, active);
  for_each_lane(active, [&](int l) {
    if (unknown[l] != 0) warp.set_undefined(d, l, unknown[l]);
  });
  warp.store_predicate(p, valid, active);
  warp.advance();
}

void bind_shfl(Binder& b) {
  if (!b.take("sync")) b.unsupported("shfl without .sync");
  const std::string mode = b.next();
  b.take(mode);
  if (!b.take("b32")) b.unsupported("a type");
  b.done();
  b.step.flow = Flow::Blocking;
  b.step.run = mode == "up"     ? run_shfl<Shuffle::Up>
               : mode == "down" ? run_shfl<Shuffle::Down>
               : mode == "bfly" ? run_shfl<Shuffle::Butterfly>
               : mode == "idx"  ? run_shfl<Shuffle::Index>
                                : nullptr;
  if (b.step.run == nullptr) b.unsupported("the mode `" + mode + "`");
  const ptx::Operand& d = b.operand(0);
  b.step.slots = {b.destination(d, kB32),
                  d.second.empty() ? Slot{} : b.destination(d.second[0], kPredicate)};
  for (int i = 1; i <= 4; ++i) b.step.slots.push_back(b.source(i, kB32));
}

// ---- vote.sync.mode d, {!}a, mask
// ----------------------------------------------------------------------

enum class Vote { All, Any, Uniform, Ballot };

// slots: d, a, mask; immediate[0]: a is negated.
template <Vote mode>
void run_vote(Warp& warp, const Step& step, LaneMask) {
  if (!together(warp, step, step.slots[2])) return;
  const LaneMask active = warp.group().lanes;
  const LaneMask unknown = warp.tainted(step.slots[1]) & active;
  LaneMask holds = warp.predicate(step.slots[1]);
  if (step.immediate[0] != 0) holds = ~holds;
  holds &= active;
  if (mode == Vote::Ballot) {
    uint32_t result[kLanes];
    std::fill_n(result, kLanes, holds);
    warp.store(step.slots[0], result, active);
    if (unknown != 0)
      for_each_lane(active, [&](int l) { warp.set_undefined(step.slots[0], l, unknown); });
  } else {
    const bool result = mode == Vote::All   ? holds == active
                        : mode == Vote::Any ? holds != 0
                                            : holds == 0 || holds == active;
    // One lane that surely decides leaves nothing undefined.
    const LaneMask sure = active & ~unknown;
    const bool decided =
        (mode == Vote::All && (sure & ~holds) != 0) || (mode == Vote::Any && (sure & holds) != 0);
    warp.store_predicate(step.slots[0], result ? kAllLanes : 0, active,
                         unknown != 0 && !decided ? kAllLanes : 0);
  }
  warp.advance();
}

void bind_vote(Binder& b) {
  if (!b.take("sync")) b.unsupported("vote without .sync");
  const std::string mode = b.next();
  b.take(mode);
  const bool ballot = mode == "ballot";
  if (!b.take(ballot ? "b32" : "pred")) b.unsupported("a type");
  b.done();
  b.step.flow = Flow::Blocking;
  b.step.run = ballot          ? run_vote<Vote::Ballot>
               : mode == "all" ? run_vote<Vote::All>
               : mode == "any" ? run_vote<Vote::Any>
               : mode == "uni" ? run_vote<Vote::Uniform>
                               : nullptr;
  if (b.step.run == nullptr) b.unsupported("the mode `" + mode + "`");
  bool negated = false;
  b.step.slots = {b.destination(0, ballot ? kB32 : kPredicate), b.predicate(b.operand(1), &negated),
                  b.source(2, kB32)};
  b.step.immediate[0] = negated;
}

// ---- match.{any,all}.sync
// ------------------------------------------------------------------------------

// slots: d, p, a, mask.
template <bool all>
void run_match(Warp& warp, const Step& step, LaneMask) {
  if (!together(warp, step, step.slots[3])) return;
  const LaneMask active = warp.group().lanes;
  const Slot& a = step.slots[2];
  const bool unknown = (warp.tainted(a) & active) != 0;
  uint32_t result[kLanes] = {};
  bool same = true;
  for_each_lane(active, [&](int l) {
    for_each_lane(active, [&](int m) {
      if (warp.value(a, l) == warp.value(a, m)) result[l] |= lane_bit(m);
    });
    same = same && result[l] == active;
  });
  if (all) std::fill_n(result, kLanes, same ? active : 0);
  warp.store(step.slots[0], result, active);
  warp.store_predicate(step.slots[1], same ? kAllLanes : 0, active, unknown ? kAllLanes : 0);
  if (unknown)
    for_each_lane(active, [&](int l) { warp.set_undefined(step.slots[0], l, ~uint32_t{0}); });
  warp.advance();
}

void bind_match(Binder& b) {
  const bool all = b.take("all");
  if (!all && !b.take("any")) b.unsupported("the mode");
  if (!b.take("sync")) b.unsupported("match without .sync");
  const Type type = b.type();
  b.done();
  b.step.flow = Flow::Blocking;
  b.step.run = all ? run_match<true> : run_match<false>;
  const ptx::Operand& d = b.operand(0);
  b.step.slots = {b.destination(d, kB32),
                  d.second.empty() ? Slot{} : b.destination(d.second[0], kPredicate),
                  b.source(1, type), b.source(2, kB32)};
}

// ---- redux.sync
// ----------------------------------------------------------------------------------------

template <class T, class Op>
void run_redux(Warp& warp, const Step& step, LaneMask) {
  if (!together(warp, step, step.slots[2])) return;
  const LaneMask active = warp.group().lanes;
  const T* a = warp.lanes<T>(step.slots[1]);
  const bool unknown = (warp.tainted(step.slots[1]) & active) != 0;
  T total = a[first_lane(active)];
  for_each_lane(active & (active - 1), [&](int l) { total = Op::apply(total, a[l]); });
  T result[kLanes];
  std::fill_n(result, kLanes, total);
  warp.store(step.slots[0], result, active);
  if (unknown)
    for_each_lane(active, [&](int l) { warp.set_undefined(step.slots[0], l, ~uint32_t{0}); });
  warp.advance();
}

template <class T>
struct Add {
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
};
template <class T>
struct Min {
  static T apply(T a, T b) { return std::min(a, b); }
};
template <class T>
struct Max {
  static T apply(T a, T b) { return std::max(a, b); }
};
struct And {
  static uint32_t apply(uint32_t a, uint32_t b) { return a & b; }
};
struct Or {
  static uint32_t apply(uint32_t a, uint32_t b) { return a | b; }
};
struct Xor {
  static uint32_t apply(uint32_t a, uint32_t b) { return a ^ b; }
};

void bind_redux(Binder& b) {
  if (!b.take("sync")) b.unsupported("redux without .sync");
  const std::string op = b.next();
  b.take(op);
  const Type type = b.type();
  b.done();
  const bool is_signed = type.is_signed();
  Handler run = nullptr;
  if (type.bits != 32 || type.is_float()) b.unsupported("a type");
  if (op == "add") run = run_redux<uint32_t, Add<uint32_t>>;
  if (op == "min")
    run = is_signed ? run_redux<int32_t, Min<int32_t>> : run_redux<uint32_t, Min<uint32_t>>;
  if (op == "max")
    run = is_signed ? run_redux<int32_t, Max<int32_t>> : run_redux<uint32_t, Max<uint32_t>>;
  if (op == "and") run = run_redux<uint32_t, And>;
  if (op == "or") run = run_redux<uint32_t, Or>;
  if (op == "xor") run = run_redux<uint32_t, Xor>;
  if (run == nullptr) b.unsupported("the operation `" + op + "`");
  b.step.flow = Flow::Blocking;
  b.step.run = run;
  b.step.slots = {b.destination(0, type), b.source(1, type), b.source(2, kB32)};
}

// ---- elect.sync d|p, mask
// ------------------------------------------------------------------------------

void run_elect(Warp& warp, const Step& step, LaneMask) {
  if (!together(warp, step, step.slots[2])) return;
  const LaneMask active = warp.group().lanes;
  const int leader = first_lane(active);
  uint32_t result[kLanes];
  std::fill_n(result, kLanes, static_cast<uint32_t>(leader));
  warp.store(step.slots[0], result, active);
  warp.store_predicate(step.slots[1], lane_bit(leader), active);
  warp.advance();
}

void bind_elect(Binder& b) {
  if (!b.take("sync")) b.unsupported("elect without .sync");
  b.done();
  b.step.flow = Flow::Blocking;
  b.step.run = run_elect;
  const ptx::Operand& d = b.operand(0);
  if (d.second.empty()) b.unsupported("elect without a predicate");
  b.step.slots = {b.destination(d, kB32), b.destination(d.second[0], kPredicate),
                  b.source(1, kB32)};
}

// ---- activemask
// ----------------------------------------------------------------------------------------

void run_activemask(Warp& warp, const Step& step, LaneMask active) {
  uint32_t result[kLanes];
  std::fill_n(result, kLanes, active);
  warp.store(step.slots[0], result, active);
}

void bind_activemask(Binder& b) {
  b.take("b32");
  b.done();
  b.step.run = run_activemask;
  b.step.slots = {b.destination(0, kB32)};
}

}  // namespace

// bar.warp.sync orders memory among the lanes that take part; the exchanges above do not.
void run_bar_warp_sync(Warp& warp, const Step& step, LaneMask) {
  if (!together(warp, step, step.slots[0])) return;
  const LaneMask lanes = warp.group().lanes;
  Gathered gathered;
  gathered.add(warp, lanes);
  ++warp.epoch;
  GatheredRef(gathered).give(warp, lanes);
  warp.advance();
}

void add_warp(Opcodes& opcodes) {
  opcodes.add("shfl", bind_shfl);
  opcodes.add("vote", bind_vote);
  opcodes.add("match", bind_match);
  opcodes.add("redux", bind_redux);
  opcodes.add("elect", bind_elect);
  opcodes.add("activemask", bind_activemask);
}

}  // namespace emulator
