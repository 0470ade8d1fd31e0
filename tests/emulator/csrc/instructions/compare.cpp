// Comparisons and selections (PTX ISA, "Comparison and Selection Instructions").
//
// A comparison is undefined where its undefined bits decide it: two integers that differ in a
// defined bit are unequal, whatever the others are, and an order holds that holds between all
// values the two may have.
#include <map>
#include <optional>

#include "arithmetic/floating.h"
#include "arithmetic/logic.h"
#include "instructions/select.h"

namespace emulator {
namespace {

using ptx::Type;

struct Equal {
  template <class U>
  static bool apply(U a, U b) {
    return a == b;
  }
  template <class U>
  static bool undefined(U a, U b, U ua, U ub) {
    const U unknown = ua | ub;
    return unknown != 0 && ((a ^ b) & ~unknown) == 0;
  }
};

struct Less {
  template <class T>
  static bool apply(T a, T b) {
    return a < b;
  }
  template <class T, class U>
  static bool undefined(T a, T b, U ua, U ub) {
    // Signed numbers are ordered as unsigned ones once their top bit is turned over.
    const U bias = std::is_signed_v<T> ? static_cast<U>(U{1} << (8 * sizeof(U) - 1)) : U{0};
    const U x = static_cast<U>(a) ^ bias, y = static_cast<U>(b) ^ bias;
    const U least_x = x & static_cast<U>(~ua), most_x = x | ua;
    const U least_y = y & static_cast<U>(~ub), most_y = y | ub;
    return !(most_x < least_y) && !(least_x >= most_y);
  }
};

// The relations of numbers that may be NaNs, of which all others are the complement or the mirror
// image.
enum class Relation { Equal, Less, LessOrEqual, LessOrGreater, Unordered };

template <Relation relation>
class FloatRelation {
 public:
  explicit FloatRelation(const Step& step) : ftz_(step.immediate[0] != 0) {}

  template <class T>
  bool apply(T a, T b) const {
    const auto x = value_of(ftz_ ? flush(a) : a), y = value_of(ftz_ ? flush(b) : b);
    switch (relation) {
      case Relation::Equal:
        return x == y;
      case Relation::Less:
        return x < y;
      case Relation::LessOrEqual:
        return x <= y;
      case Relation::LessOrGreater:
        return x < y || x > y;
      case Relation::Unordered:
        return x != x || y != y;
    }
    return false;
  }

 private:
  bool ftz_;
};

using Comparison = Verdict (*)(const Warp&, const Step&, const std::array<Slot, 2>&, int, LaneMask);
enum class Combination { None, And, Or, Xor };

struct Compare : Detail {
  Comparison test = nullptr;
  bool mirrored = false;  // b is compared with a
  bool negated = false;
  int elements = 1;
  Combination combination = Combination::None;
  bool negates_c = false;
  uint64_t truth = 0;  // what `set` writes: an element's bits
  int element_bits = 0;
};

template <class Op>
Verdict combine(Verdict x, Verdict y) {
  return {Op::apply(x.holds, y.holds), Op::undefined(x.holds, y.holds, x.undefined, y.undefined)};
}

Verdict combine(Combination combination, Verdict x, Verdict c) {
  switch (combination) {
    case Combination::And:
      return combine<And>(x, c);
    case Combination::Or:
      return combine<Or>(x, c);
    case Combination::Xor:
      return combine<Xor>(x, c);
    case Combination::None:
      break;
  }
  return x;
}

// Slots of the sources within step.slots; c is there where the comparison is combined with it.
Verdict compare(const Warp& warp, const Step& step, const Compare& what, size_t a, int element,
                LaneMask active) {
  std::array<Slot, 2> sources{step.slots[a], step.slots[a + 1]};
  if (what.mirrored) std::swap(sources[0], sources[1]);
  Verdict verdict = what.test(warp, step, sources, element, active);
  if (what.negated) verdict.holds = ~verdict.holds;
  return verdict;
}

Verdict third(const Warp& warp, const Step& step, const Compare& what, size_t c) {
  if (what.combination == Combination::None) return {};
  const LaneMask value = warp.predicate(step.slots[c]);
  return {what.negates_c ? ~value : value, warp.tainted(step.slots[c])};
}

// setp: p = t op c, q = !t op c; packed types compare their low halves for p and their high halves
// for q. step.slots: p, q, a, b, c.
void run_setp(Warp& warp, const Step& step, LaneMask active) {
  const auto& what = static_cast<const Compare&>(*step.detail);
  const Verdict c = third(warp, step, what, 4);
  const Verdict t = compare(warp, step, what, 2, 0, active);
  Verdict other = t;
  if (what.elements == 2) {
    other = compare(warp, step, what, 2, 1, active);
  } else {
    other.holds = ~other.holds;
  }
  const Verdict p = combine(what.combination, t, c), q = combine(what.combination, other, c);
  warp.store_predicate(step.slots[0], p.holds, active, p.undefined);
  warp.store_predicate(step.slots[1], q.holds, active, q.undefined);
}

// set: every element of d becomes `truth` or 0. step.slots: d, a, b, c.
template <class Lane>
void run_set(Warp& warp, const Step& step, LaneMask active) {
  const auto& what = static_cast<const Compare&>(*step.detail);
  const Verdict c = third(warp, step, what, 3);
  Lane result[kLanes] = {}, undefined[kLanes] = {};
  LaneMask tainted = 0;
  for (int n = 0; n < what.elements; ++n) {
    const Verdict t = combine(what.combination, compare(warp, step, what, 1, n, active), c);
    const auto truth = static_cast<Lane>(what.truth << (n * what.element_bits));
    for (int l = 0; l < kLanes; ++l) {
      if ((t.holds >> l & 1) != 0) result[l] |= truth;
      if ((t.undefined >> l & 1) != 0) undefined[l] |= truth;
    }
    tainted |= t.undefined;
  }
  warp.store(step.slots[0], result, active);
  for_each_lane(tainted & active,
                [&](int l) { warp.set_undefined(step.slots[0], l, undefined[l]); });
}

// d = the verdict ? a : b. Where it is unknown, the bits are defined in which a and b agree.
template <class U>
void select(Warp& warp, const Step& step, Verdict first, LaneMask active) {
  const Slot &d = step.slots[0], &a = step.slots[1], &b = step.slots[2];
  const U *x = warp.lanes<U>(a), *y = warp.lanes<U>(b);
  U result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = (first.holds >> l & 1) != 0 ? x[l] : y[l];
  const LaneMask tainted = (first.undefined | warp.tainted(a) | warp.tainted(b)) & active;
  U undefined[kLanes];
  for_each_lane(tainted, [&](int l) {
    const U ux = warp.undefined_of<U>(a, l), uy = warp.undefined_of<U>(b, l);
    const bool known = (first.undefined >> l & 1) == 0;
    undefined[l] =
        known ? ((first.holds >> l & 1) != 0 ? ux : uy) : static_cast<U>((x[l] ^ y[l]) | ux | uy);
  });
  warp.store(d, result, active);
  for_each_lane(tainted, [&](int l) { warp.set_undefined(d, l, undefined[l]); });
}

template <class U>
void run_selp(Warp& warp, const Step& step, LaneMask active) {
  const LaneMask p = warp.predicate(step.slots[3]);
  select<U>(warp, step, {step.immediate[0] != 0 ? ~p : p, warp.tainted(step.slots[3])}, active);
}

struct NotNegative {  // of integers the sign bit alone tells
  static bool apply(int32_t c) { return c >= 0; }
  static bool undefined(int32_t, uint32_t uc) { return uc >> 31 != 0; }
};
class AtLeastZero {  // -0 is, a NaN is not
 public:
  explicit AtLeastZero(const Step& step) : ftz_(step.immediate[0] != 0) {}
  bool apply(float c) const { return (ftz_ ? flush(c) : c) >= 0; }

 private:
  bool ftz_;
};

template <class U, class Op, class C>
void run_slct(Warp& warp, const Step& step, LaneMask active) {
  select<U>(warp, step, Test<1, Op, C>::run(warp, step, {step.slots[3]}, 0, active), active);
}

struct Spelling {
  Relation relation;
  bool mirrored, negated;
};

std::optional<Spelling> integer_spelling(const std::string& name, const Type& type) {
  static const std::map<std::string, Spelling> kSigned = {
      {"eq", {Relation::Equal, false, false}}, {"ne", {Relation::Equal, false, true}},
      {"lt", {Relation::Less, false, false}},  {"gt", {Relation::Less, true, false}},
      {"le", {Relation::Less, true, true}},    {"ge", {Relation::Less, false, true}}};
  static const std::map<std::string, std::string> kUnsigned = {
      {"lo", "lt"}, {"hi", "gt"}, {"ls", "le"}, {"hs", "ge"}};
  const auto renamed = kUnsigned.find(name);
  if (renamed != kUnsigned.end() && type.cls != Type::Class::Unsigned) return std::nullopt;
  const auto found = kSigned.find(renamed == kUnsigned.end() ? name : renamed->second);
  if (found == kSigned.end()) return std::nullopt;
  // Bit strings have no order.
  if (type.cls == Type::Class::Bits && found->second.relation != Relation::Equal)
    return std::nullopt;
  return found->second;
}

std::optional<Spelling> float_spelling(const std::string& name) {
  using R = Relation;
  static const std::map<std::string, Spelling> kSpellings = {
      {"eq", {R::Equal, false, false}},         {"ne", {R::LessOrGreater, false, false}},
      {"lt", {R::Less, false, false}},          {"gt", {R::Less, true, false}},
      {"le", {R::LessOrEqual, false, false}},   {"ge", {R::LessOrEqual, true, false}},
      {"equ", {R::LessOrGreater, false, true}}, {"neu", {R::Equal, false, true}},
      {"ltu", {R::LessOrEqual, true, true}},    {"gtu", {R::LessOrEqual, false, true}},
      {"leu", {R::Less, true, true}},           {"geu", {R::Less, false, true}},
      {"nan", {R::Unordered, false, false}},    {"num", {R::Unordered, false, true}}};
  const auto found = kSpellings.find(name);
  if (found == kSpellings.end()) return std::nullopt;
  return found->second;
}

template <class T>
Comparison integer_test(Relation relation) {
  if (relation == Relation::Equal) {
    using U = std::make_unsigned_t<T>;
    return Test<1, Equal, U, U>::run;
  }
  return Test<1, Less, T, T>::run;
}

template <int N, class T>
Comparison float_test(Relation relation) {
  switch (relation) {
    case Relation::Equal:
      return Test<N, FloatRelation<Relation::Equal>, T, T>::run;
    case Relation::Less:
      return Test<N, FloatRelation<Relation::Less>, T, T>::run;
    case Relation::LessOrEqual:
      return Test<N, FloatRelation<Relation::LessOrEqual>, T, T>::run;
    case Relation::LessOrGreater:
      return Test<N, FloatRelation<Relation::LessOrGreater>, T, T>::run;
    case Relation::Unordered:
      return Test<N, FloatRelation<Relation::Unordered>, T, T>::run;
  }
  return nullptr;
}

Comparison choose(const Type& type, Relation relation) {
  if (type.is_float()) {
    const bool bfloat = type.cls == Type::Class::BFloat;
    if (type.cls == Type::Class::TFloat) return nullptr;
    if (type.bits == 32 && type.count == 1) return float_test<1, float>(relation);
    if (type.bits == 64) return float_test<1, double>(relation);
    if (type.bits != 16) return nullptr;
    if (type.count == 2)
      return bfloat ? float_test<2, BF16>(relation) : float_test<2, F16>(relation);
    return bfloat ? float_test<1, BF16>(relation) : float_test<1, F16>(relation);
  }
  if (type.count != 1) return nullptr;
  const bool is_signed = type.is_signed();
  switch (type.bits) {
    case 16:
      return is_signed ? integer_test<int16_t>(relation) : integer_test<uint16_t>(relation);
    case 32:
      return is_signed ? integer_test<int32_t>(relation) : integer_test<uint32_t>(relation);
    case 64:
      return is_signed ? integer_test<int64_t>(relation) : integer_test<uint64_t>(relation);
    default:
      return nullptr;
  }
}

// .CmpOp{.BoolOp}{.ftz}, whose meaning the type tells that follows.
struct Modifiers {
  std::string relation;
  Combination combination = Combination::None;
  bool ftz;

  explicit Modifiers(Binder& b) {
    relation = b.next();
    b.take(relation);
    if (b.take("and")) combination = Combination::And;
    if (b.take("or")) combination = Combination::Or;
    if (b.take("xor")) combination = Combination::Xor;
    ftz = b.take("ftz");
  }
};

// The comparison of two operands of the type; operand 3 is c.
std::shared_ptr<Compare> make_compare(Binder& b, const Modifiers& modifiers, const Type& type) {
  const auto spelling = type.is_float() ? float_spelling(modifiers.relation)
                                        : integer_spelling(modifiers.relation, type);
  if (!spelling) b.unsupported("the comparison `" + modifiers.relation + "`");
  if (modifiers.ftz && (!type.is_float() || type.bits == 64 || type.cls == Type::Class::BFloat)) {
    b.unsupported(".ftz of that type");
  }
  auto what = std::make_shared<Compare>();
  what->test = choose(type, spelling->relation);
  if (what->test == nullptr) b.unsupported("a comparison of that type");
  what->mirrored = spelling->mirrored;
  what->negated = spelling->negated;
  what->elements = type.count;
  what->combination = modifiers.combination;
  b.step.immediate[0] = modifiers.ftz;
  b.done();
  const bool combined = modifiers.combination != Combination::None;
  if (b.operand_count() != (combined ? 4 : 3)) b.unsupported("the number of operands");
  return what;
}

void push_sources(Binder& b, const Type& type, Compare* what) {
  b.step.slots.push_back(b.source(1, type));
  b.step.slots.push_back(b.source(2, type));
  if (what->combination != Combination::None) {
    b.step.slots.push_back(b.predicate(b.operand(3), &what->negates_c));
  }
}

void bind_setp(Binder& b) {
  const Modifiers modifiers(b);
  const Type type = b.type();
  const auto what = make_compare(b, modifiers, type);
  const auto& second = b.operand(0).second;
  b.step.slots = {b.destination(0, kPredicate),
                  second.empty() ? Slot{} : b.destination(second[0], kPredicate)};
  push_sources(b, type, what.get());
  b.step.detail = what;
  b.step.run = run_setp;
}

void bind_set(Binder& b) {
  const Modifiers modifiers(b);
  const Type to = b.type(), type = b.type();
  const auto what = make_compare(b, modifiers, type);
  if (to.count != type.count || to.cls == Type::Class::Bits || (to.bits != 16 && to.bits != 32)) {
    b.unsupported("a result of that type");
  }
  what->element_bits = to.bits;
  what->truth = (uint64_t{1} << to.bits) - 1;
  if (to.cls == Type::Class::BFloat) what->truth = encode<BFloat16>(1.0);
  if (to.cls == Type::Class::Float)
    what->truth = to.bits == 16 ? encode<Binary16>(1.0) : bits_of(1.0f);
  b.step.slots = {b.destination(0, to)};
  push_sources(b, type, what.get());
  b.step.detail = what;
  b.step.run = to.bytes() == 2 ? run_set<uint16_t> : run_set<uint32_t>;
}

void bind_selp(Binder& b) {
  const Type type = b.type();
  b.done();
  b.step.run = for_words(type, [](auto u) -> Handler { return run_selp<decltype(u)>; });
  if (b.step.run == nullptr || b.operand_count() != 4) b.unsupported("this form");
  bool negated = false;
  b.step.slots = {b.destination(0, type), b.source(1, type), b.source(2, type),
                  b.predicate(b.operand(3), &negated)};
  b.step.immediate[0] = negated;
}

void bind_slct(Binder& b) {
  const bool ftz = b.take("ftz");
  const Type type = b.type(), third = b.type();
  const bool is_float = third == Type{Type::Class::Float, 32, 1};
  if (!is_float && (third != Type{Type::Class::Signed, 32, 1} || ftz)) b.unsupported("this form");
  b.step.immediate[0] = ftz;
  const Handler run = for_words(type, [&](auto u) -> Handler {
    using U = decltype(u);
    return is_float ? run_slct<U, AtLeastZero, float> : run_slct<U, NotNegative, int32_t>;
  });
  bind(b, run, type, {type, type, third});
}

}  // namespace

void add_compare(Opcodes& opcodes) {
  opcodes.add("setp", bind_setp);
  opcodes.add("set", bind_set);
  opcodes.add("selp", bind_selp);
  opcodes.add("slct", bind_slct);
}

}  // namespace emulator
