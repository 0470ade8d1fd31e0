// Logic and shifts (PTX ISA, "Logic and Shift Instructions").
//
// Shifts and permutations move undefined bits as they move the others; an undefined amount or
// selection spoils the whole result.
#include "arithmetic/logic.h"

#include "arithmetic/integer.h"
#include "instructions/select.h"

namespace emulator {
namespace {

using ptx::Type;

struct LogicalNot {  // cnot: only the last bit can be other than zero
  template <class U>
  static U apply(U a) {
    return a == 0;
  }
  template <class U>
  static U undefined(U a, U ua) {
    return (a & ~ua) == 0 && ua != 0;
  }
};

// Any function of three bits, as a table of its eight values: bit 4 a + 2 b + c (PTX ISA, "lop3").
class Lookup {
 public:
  explicit Lookup(const Step& step) : table_(static_cast<uint32_t>(step.immediate[0])) {}

  uint32_t apply(uint32_t a, uint32_t b, uint32_t c) const {
    return reachable(table_, a, ~a, b, ~b, c, ~c);
  }
  // Undefined is a bit that can become both 1 and 0.
  uint32_t undefined(uint32_t a, uint32_t b, uint32_t c, uint32_t ua, uint32_t ub,
                     uint32_t uc) const {
    const uint32_t a1 = a | ua, a0 = ~a | ua, b1 = b | ub, b0 = ~b | ub, c1 = c | uc, c0 = ~c | uc;
    return reachable(table_, a1, a0, b1, b0, c1, c0) & reachable(~table_, a1, a0, b1, b0, c1, c0);
  }

 private:
  // The bits for which some row of the table that holds 1 can be met; x1: the bits of x that can
  // be 1.
  static uint32_t reachable(uint32_t table, uint32_t a1, uint32_t a0, uint32_t b1, uint32_t b0,
                            uint32_t c1, uint32_t c0) {
    uint32_t bits = 0;
    for (int row = 0; row < 8; ++row) {
      const uint32_t met =
          ((row & 4) != 0 ? a1 : a0) & ((row & 2) != 0 ? b1 : b0) & ((row & 1) != 0 ? c1 : c0);
      bits |= (table >> row & 1) != 0 ? met : 0;
    }
    return bits;
  }

  uint32_t table_;
};

// One by one, as shl and shr do; amounts past the width leave zeros or the sign.
struct ShiftLeft {
  template <class U>
  static U apply(U a, uint32_t by) {
    return shift_left(a, by);
  }
  template <class U>
  static U undefined(U, uint32_t by, U ua, uint32_t uby) {
    return uby != 0 ? static_cast<U>(~U{0}) : shift_left(ua, by);
  }
};

struct ShiftRight {
  template <class T>
  static T apply(T a, uint32_t by) {
    return shift_right(a, by);
  }
  template <class T, class U>
  static U undefined(T, uint32_t by, U ua, uint32_t uby) {
    if (uby != 0) return static_cast<U>(~U{0});
    return static_cast<U>(shift_right(static_cast<T>(ua), by));
  }
};

// shf: 32 of the 64 bits of b:a, moved to the left (the high half is kept) or to the right (the low
// one).
template <bool kLeft, bool kClamp>
struct FunnelShift {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t by) {
    const uint32_t n = kClamp ? (by < 32 ? by : 32) : by & 31;
    const uint64_t both = uint64_t{b} << 32 | a;
    return static_cast<uint32_t>(kLeft ? both << n >> 32 : both >> n);
  }
  static uint32_t undefined(uint32_t, uint32_t, uint32_t by, uint32_t ua, uint32_t ub,
                            uint32_t uby) {
    if ((kClamp ? uby : uby & 31) != 0) return ~uint32_t{0};
    return apply(ua, ub, by);
  }
};

// prmt: each byte of the result is one of the eight of b:a, or that byte's sign eight times over.
class Permute {
 public:
  enum Mode { Generic, F4e, B4e, Rc8, Ecl, Ecr, Rc16 };

  explicit Permute(const Step& step) : mode_(static_cast<Mode>(step.immediate[0])) {}

  uint32_t apply(uint32_t a, uint32_t b, uint32_t c) const {
    const uint64_t both = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const int selection = select(i, c);
      const auto byte = static_cast<uint8_t>(both >> (8 * (selection & 7)));
      const uint32_t chosen = (selection & 8) == 0 ? byte : (byte >> 7 != 0 ? 0xff : 0);
      result |= chosen << (8 * i);
    }
    return result;
  }
  uint32_t undefined(uint32_t, uint32_t, uint32_t c, uint32_t ua, uint32_t ub, uint32_t uc) const {
    if (mode_ != Generic) return (uc & 3) != 0 ? ~uint32_t{0} : apply(ua, ub, c);
    uint32_t unknown = 0;  // the bytes whose selection is
    for (int i = 0; i < 4; ++i) unknown |= (uc >> (4 * i) & 15) != 0 ? 0xffu << (8 * i) : 0;
    return apply(ua, ub, c) | unknown;
  }

 private:
  // The source of byte i: PTX ISA's tables for prmt, by mode and the last two bits of c.
  int select(int i, uint32_t c) const {
    const int k = static_cast<int>(c & 3);
    switch (mode_) {
      case Generic:
        return static_cast<int>(c >> (4 * i) & 15);
      case F4e:
        return k + i;
      case B4e:
        return (k - i) & 7;
      case Rc8:
        return k;
      case Ecl:
        return i < k ? k : i;
      case Ecr:
        return i < k ? i : k;
      case Rc16:
        return 2 * (k & 1) + (i & 1);
    }
    return 0;
  }

  Mode mode_;
};

// Predicates are masks over the lanes, so the whole warp is one word of `Op`.
template <class Op>
void run_predicate(Warp& warp, const Step& step, LaneMask active) {
  const Slot& a = step.slots[1];
  const LaneMask va = warp.predicate(a), ua = warp.tainted(a);
  if constexpr (std::is_same_v<Op, Not>) {
    warp.store_predicate(step.slots[0], Op::apply(va), active, Op::undefined(va, ua));
  } else {
    const Slot& b = step.slots[2];
    const LaneMask vb = warp.predicate(b), ub = warp.tainted(b);
    warp.store_predicate(step.slots[0], Op::apply(va, vb), active, Op::undefined(va, vb, ua, ub));
  }
}

template <class Op, int Sources>
void bind_bitwise(Binder& b) {
  const Type type = b.type();
  Handler run = nullptr;
  if (type.cls == Type::Class::Bits) {
    run = for_words(type, [](auto u) { return uniform<1, Op, decltype(u), Sources>(); });
  }
  if constexpr (Sources == 2) {
    if (type == kPredicate) run = run_predicate<Op>;
    bind(b, run, type, {type, type});
  } else {
    if (type == kPredicate && std::is_same_v<Op, Not>) run = run_predicate<Not>;
    bind(b, run, type, {type});
  }
}

// lop3.BoolOp: also p = (d != 0) BoolOp q. slots: d, a, b, c, p, q; immediate[1]: and; [2]: !q.
void run_lookup_predicate(Warp& warp, const Step& step, LaneMask active) {
  // The test looks at d's value, which has no register where d is `_`: so it is worked out here
  // again.
  const Lookup lookup(step);
  const Slot *a = &step.slots[1], *b = &step.slots[2], *c = &step.slots[3];
  LaneMask nonzero = 0, unknown = 0;
  for_each_lane(active, [&](int l) {
    const auto x = warp.lanes<uint32_t>(*a)[l], y = warp.lanes<uint32_t>(*b)[l],
               z = warp.lanes<uint32_t>(*c)[l];
    const uint32_t value = lookup.apply(x, y, z);
    const uint32_t undefined =
        lookup.undefined(x, y, z, warp.undefined_of<uint32_t>(*a, l),
                         warp.undefined_of<uint32_t>(*b, l), warp.undefined_of<uint32_t>(*c, l));
    if (value != 0) nonzero |= lane_bit(l);
    if ((value & ~undefined) == 0 && undefined != 0) unknown |= lane_bit(l);
  });
  const Slot& q = step.slots[5];
  const LaneMask vq = step.immediate[2] != 0 ? ~warp.predicate(q) : warp.predicate(q);
  const LaneMask uq = warp.tainted(q);
  uniform<1, Lookup, uint32_t, 3>()(warp, step, active);
  if (step.immediate[1] != 0) {
    warp.store_predicate(step.slots[4], And::apply(nonzero, vq), active,
                         And::undefined(nonzero, vq, unknown, uq));
  } else {
    warp.store_predicate(step.slots[4], Or::apply(nonzero, vq), active,
                         Or::undefined(nonzero, vq, unknown, uq));
  }
}

void bind_lookup(Binder& b) {
  const bool conjunction = b.take("and");
  const bool combined = conjunction || b.take("or");
  if (b.type() != kB32) b.unsupported("another type than .b32");
  b.done();
  if (b.operand_count() != (combined ? 6 : 5)) b.unsupported("the number of operands");
  Step& step = b.step;
  const auto& second = b.operand(0).second;
  if (combined == second.empty()) b.unsupported("the destinations");
  step.slots = {b.destination(0, kB32), b.source(1, kB32), b.source(2, kB32), b.source(3, kB32)};
  step.immediate[0] = b.immediate(4);
  if (step.immediate[0] < 0 || step.immediate[0] > 255) b.unsupported("a table outside 0 to 255");
  step.run = uniform<1, Lookup, uint32_t, 3>();
  if (!combined) return;
  bool negated = false;
  step.slots.push_back(b.destination(second[0], kPredicate));
  step.slots.push_back(b.predicate(b.operand(5), &negated));
  step.immediate[1] = conjunction;
  step.immediate[2] = negated;
  step.run = run_lookup_predicate;
}

void bind_shift_left(Binder& b) {
  const Type type = b.type();
  Handler run = nullptr;
  if (type.cls == Type::Class::Bits) {
    run = for_words(type, [](auto u) -> Handler {
      return Elementwise<ShiftLeft, decltype(u), decltype(u), uint32_t>::run;
    });
  }
  bind(b, run, type, {type, kU32});
}

void bind_shift_right(Binder& b) {
  const Type type = b.type();
  const auto shift = [](auto t) -> Handler {
    return Elementwise<ShiftRight, decltype(t), decltype(t), uint32_t>::run;
  };
  const Handler run =
      type.cls == Type::Class::Bits ? for_words(type, shift) : for_integers(type, shift);
  bind(b, run, type, {type, kU32});
}

void bind_funnel_shift(Binder& b) {
  const bool left = b.take("l");
  if (!left && !b.take("r")) b.unsupported("neither .l nor .r");
  const bool clamp = b.take("clamp");
  if (!clamp && !b.take("wrap")) b.unsupported("neither .clamp nor .wrap");
  if (b.type() != kB32) b.unsupported("another type than .b32");
  constexpr Handler kRun[2][2] = {{uniform<1, FunnelShift<false, false>, uint32_t, 3>(),
                                   uniform<1, FunnelShift<false, true>, uint32_t, 3>()},
                                  {uniform<1, FunnelShift<true, false>, uint32_t, 3>(),
                                   uniform<1, FunnelShift<true, true>, uint32_t, 3>()}};
  bind(b, kRun[left][clamp], kB32, {kB32, kB32, kU32});
}

void bind_permute(Binder& b) {
  if (b.type() != kB32) b.unsupported("another type than .b32");
  static constexpr const char* kModes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  for (int mode = Permute::F4e; mode <= Permute::Rc16; ++mode) {
    if (b.take(kModes[mode])) b.step.immediate[0] = mode;
  }
  bind(b, uniform<1, Permute, uint32_t, 3>(), kB32, {kB32, kB32, kB32});
}

}  // namespace

void add_logic(Opcodes& opcodes) {
  opcodes.add("and", bind_bitwise<And, 2>);
  opcodes.add("or", bind_bitwise<Or, 2>);
  opcodes.add("xor", bind_bitwise<Xor, 2>);
  opcodes.add("not", bind_bitwise<Not, 1>);
  opcodes.add("cnot", bind_bitwise<LogicalNot, 1>);
  opcodes.add("lop3", bind_lookup);
  opcodes.add("shl", bind_shift_left);
  opcodes.add("shr", bind_shift_right);
  opcodes.add("shf", bind_funnel_shift);
  opcodes.add("prmt", bind_permute);
}

}  // namespace emulator
