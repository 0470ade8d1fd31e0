// mov, and generic addresses (PTX ISA, "Data Movement and Conversion Instructions": mov, cvta,
// isspacep).
#include "arithmetic/integer.h"
#include "core/address_space.h"
#include "instructions/select.h"

namespace emulator {
namespace {

using ptx::Operand;
using ptx::Type;

struct Copy {
  template <class U>
  static U apply(U a) {
    return a;
  }
  template <class U>
  static U undefined(U, U ua) {
    return ua;
  }
};

void run_predicate(Warp& warp, const Step& step, LaneMask active) {
  const Slot& a = step.slots[1];
  warp.store_predicate(step.slots[0], warp.predicate(a), active, warp.tainted(a));
}

void run_predicate_constant(Warp& warp, const Step& step, LaneMask active) {
  warp.store_predicate(step.slots[0], step.immediate[0] != 0 ? kAllLanes : 0, active);
}

// mov.b32 d, {a, b}: the first element is the lowest. step.slots: d, then the elements.
template <class Whole, class Part>
void run_pack(Warp& warp, const Step& step, LaneMask active) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  Part parts[kLanes][kParts];
  Part undefined[kLanes][kParts] = {};
  LaneMask tainted = 0;
  for (int i = 0; i < kParts; ++i) {
    const Slot& slot = step.slots[static_cast<size_t>(i) + 1];
    const Part* lanes = warp.lanes<Part>(slot);
    for (int l = 0; l < kLanes; ++l) parts[l][i] = lanes[l];
    const LaneMask here = warp.tainted(slot) & active;
    for_each_lane(here, [&](int l) { undefined[l][i] = warp.undefined_of<Part>(slot, l); });
    tainted |= here;
  }
  Whole result[kLanes];
  std::memcpy(result, parts, sizeof result);
  warp.store(step.slots[0], result, active);
  for_each_lane(tainted, [&](int l) {
    Whole bits;
    std::memcpy(&bits, undefined[l], sizeof bits);
    warp.set_undefined(step.slots[0], l, bits);
  });
}

// mov.b32 {a, b}, d. step.slots: d, then the elements, some of which may be `_`.
template <class Whole, class Part>
void run_unpack(Warp& warp, const Step& step, LaneMask active) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  const Slot& source = step.slots[0];
  const Whole* whole = warp.lanes<Whole>(source);
  const LaneMask tainted = warp.tainted(source) & active;
  for (int i = 0; i < kParts; ++i) {
    const Slot& slot = step.slots[static_cast<size_t>(i) + 1];
    const int shift = 8 * static_cast<int>(sizeof(Part)) * i;
    Part part[kLanes];
    for (int l = 0; l < kLanes; ++l) part[l] = static_cast<Part>(whole[l] >> shift);
    warp.store(slot, part, active);
    for_each_lane(tainted, [&](int l) {
      warp.set_undefined(slot, l, static_cast<Part>(warp.undefined_of<Whole>(source, l) >> shift));
    });
  }
}

struct Moves {
  Handler pack, unpack;
};

// The handlers for a register of `bits` in `parts` elements.
Moves moves_of(int bits, size_t parts) {
  const auto of = [](auto whole, auto part) -> Moves {
    using Whole = decltype(whole);
    using Part = decltype(part);
    return {run_pack<Whole, Part>, run_unpack<Whole, Part>};
  };
  if (bits == 16 && parts == 2) return of(uint16_t{}, uint8_t{});
  if (bits == 32 && parts == 2) return of(uint32_t{}, uint16_t{});
  if (bits == 32 && parts == 4) return of(uint32_t{}, uint8_t{});
  if (bits == 64 && parts == 2) return of(uint64_t{}, uint32_t{});
  if (bits == 64 && parts == 4) return of(uint64_t{}, uint16_t{});
  return {nullptr, nullptr};
}

void bind_vector(Binder& b, const Type& type, bool packs) {
  const Operand& vector = b.operand(packs ? 1 : 0);
  const Moves moves = moves_of(type.bits, vector.elements.size());
  if (type.cls != Type::Class::Bits || moves.pack == nullptr)
    b.unsupported("a vector of this shape");
  const Type part{Type::Class::Bits, type.bits / static_cast<int>(vector.elements.size()), 1};
  Step& step = b.step;
  step.run = packs ? moves.pack : moves.unpack;
  step.slots = {packs ? b.destination(0, type) : b.source(1, type)};
  for (const Operand& element : vector.elements) {
    step.slots.push_back(packs ? b.source(element, part) : b.destination(element, part));
  }
}

void bind_move(Binder& b) {
  const Type type = b.type();
  b.done();
  if (b.operand_count() != 2) b.unsupported("the number of operands");
  const bool packs = b.operand(1).kind == Operand::Kind::Vector;
  if (packs || b.operand(0).kind == Operand::Kind::Vector) return bind_vector(b, type, packs);
  Step& step = b.step;
  if (type == kPredicate) {
    step.slots = {b.destination(0, type)};
    if (b.is_immediate(1)) {
      step.immediate[0] = b.immediate(1);
      step.run = run_predicate_constant;
    } else {
      bool negated = false;
      step.slots.push_back(b.predicate(b.operand(1), &negated));
      if (negated) b.unsupported("a negated operand");
      step.run = run_predicate;
    }
    return;
  }
  bind(b, for_words(type, [](auto u) { return uniform<1, Copy, decltype(u), 1>(); }), type, {type});
}

// Windows are multiples of 2^32: adding or taking one away leaves the bits below alone, and carries
// above.
class Rebase {
 public:
  explicit Rebase(const Step& step) : distance_(static_cast<uint64_t>(step.immediate[0])) {}
  uint64_t apply(uint64_t a) const { return a + distance_; }
  static uint64_t undefined(uint64_t, uint64_t ua) {
    constexpr uint64_t kLow = kWindowBytes - 1;
    return (ua & kLow) | upwards(ua & ~kLow);
  }

 private:
  uint64_t distance_;
};

// The window of the state space that a modifier names.
uint64_t take_window(Binder& b) {
  for (const char* shared : {"shared", "shared::cta", "shared::cluster"}) {
    if (b.take(shared)) return kSharedWindow;
  }
  for (const char* parameter : {"param", "param::entry"}) {
    if (b.take(parameter)) return kParameterWindow;
  }
  if (b.take("local")) return kLocalWindow;
  if (b.take("const")) return kConstantWindow;
  if (b.take("global")) return 0;
  b.unsupported("the state space `" + b.next() + "`");
}

// cvta{.to}.space.u64: global addresses, and constant ones here, are generic addresses as they are.
void bind_address(Binder& b) {
  const bool to_space = b.take("to");
  const uint64_t window = take_window(b);
  const Type type = b.type();
  if (type != Type{Type::Class::Unsigned, 64, 1}) b.unsupported("addresses other than .u64");
  b.step.immediate[0] = static_cast<int64_t>(to_space ? uint64_t{0} - window : window);
  bind(b,
       window == 0 ? uniform<1, Copy, uint64_t, 1>() : Elementwise<Rebase, uint64_t, uint64_t>::run,
       type, {type});
}

class InWindow {
 public:
  explicit InWindow(const Step& step) : window_(static_cast<uint64_t>(step.immediate[0])) {}
  bool apply(uint64_t a) const { return in_window(a, window_); }

 private:
  uint64_t window_;
};

// "isspacep.global returns 1 for Kernel Function Parameters as .param window is contained within
// the .global window" (PTX ISA).
struct InGlobal {
  static bool apply(uint64_t a) {
    return !in_window(a, kSharedWindow) && !in_window(a, kLocalWindow);
  }
};

void bind_is_space(Binder& b) {
  if (b.next() == "const") b.unsupported("constants, which have no window of their own,");
  const uint64_t window = take_window(b);
  b.step.immediate[0] = static_cast<int64_t>(window);
  const Type type{Type::Class::Unsigned, 64, 1};
  bind(b, window == 0 ? Predicated<InGlobal, uint64_t>::run : Predicated<InWindow, uint64_t>::run,
       kPredicate, {type});
}

}  // namespace

void add_move(Opcodes& opcodes) {
  opcodes.add("mov", bind_move);
  opcodes.add("cvta", bind_address);
  opcodes.add("isspacep", bind_is_space);
}

}  // namespace emulator
