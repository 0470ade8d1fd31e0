// cvt (PTX ISA, "Data Movement and Conversion Instructions: cvt").
//
// Between plain types a conversion goes through 64-bit lanes: integers as themselves, extended,
// numbers with a point as doubles, which hold every other format exactly. So each type needs one
// way in and one way out, and registers may be wider than the type.
#include <limits>
#include <map>

#include "arithmetic/floating.h"
#include "arithmetic/integer.h"
#include "instructions/select.h"

namespace emulator {
namespace {

using ptx::Type;

struct Conversion : Detail {
  Type from, to;
  Rounding rounding = Rounding::Nearest;
  bool has_rounding = false;
  bool to_integral = false;  // .rni and the like
  bool ftz = false, sat = false, relu = false, satfinite = false;
};

bool is(const Type& type, Type::Class cls, int bits) {
  return type == Type{cls, bits, 1};
}
bool is_f32(const Type& type) {
  return is(type, Type::Class::Float, 32);
}
bool is_f64(const Type& type) {
  return is(type, Type::Class::Float, 64);
}

// Calls `visit(T{})` with the host's type of an integer of 8 to 64 bits.
template <class Visit>
void visit_integer(const Type& type, Visit visit) {
  const bool is_signed = type.is_signed();
  switch (type.bits) {
    case 8:
      return is_signed ? visit(int8_t{}) : visit(uint8_t{});
    case 16:
      return is_signed ? visit(int16_t{}) : visit(uint16_t{});
    case 32:
      return is_signed ? visit(int32_t{}) : visit(uint32_t{});
    default:
      return is_signed ? visit(int64_t{}) : visit(uint64_t{});
  }
}

// Calls `visit(T{})` with float, double, F16 or BF16; tf32 registers hold floats.
template <class Visit>
void visit_floating(const Type& type, Visit visit) {
  if (type.bits == 16) return type.cls == Type::Class::BFloat ? visit(BF16{}) : visit(F16{});
  return type.bits == 64 ? visit(double{}) : visit(float{});
}

// The low bytes of each lane, however wide the register.
template <class T, class Use>
void for_each_low(const Warp& warp, const Slot& slot, Use use) {
  if (slot.width == sizeof(T)) {
    const T* values = warp.lanes<T>(slot);
    for (int l = 0; l < kLanes; ++l) use(l, values[l]);
    return;
  }
  const auto* bytes = warp.lanes<uint8_t>(slot);
  for (int l = 0; l < kLanes; ++l) {
    T value;
    std::memcpy(&value, bytes + l * slot.width, sizeof value);
    use(l, value);
  }
}

void load_integers(const Warp& warp, const Slot& slot, const Type& type, uint64_t* values) {
  visit_integer(type, [&](auto t) {
    using T = decltype(t);
    for_each_low<T>(warp, slot, [&](int l, T x) { values[l] = static_cast<uint64_t>(x); });
  });
}

void load_floating(const Warp& warp, const Slot& slot, const Type& type, double* values) {
  visit_floating(type, [&](auto t) {
    using T = decltype(t);
    for_each_low<T>(warp, slot, [&](int l, T x) { values[l] = value_of(x); });
  });
}

// A result's bits, extended to 64 by the sign of its type, for registers that are wider than it.
template <class T>
uint64_t extended(T x) {
  return static_cast<uint64_t>(x);
}

// Keeps the low bits of the destination type and extends them again.
uint64_t fit(uint64_t x, const Type& type) {
  uint64_t result = 0;
  visit_integer(type, [&](auto t) { result = extended(static_cast<decltype(t)>(x)); });
  return result;
}

void integers_to_integers(const Conversion& c, const uint64_t* values, uint64_t* bits) {
  visit_integer(c.to, [&](auto t) {
    using T = decltype(t);
    if (!c.sat) {
      for (int l = 0; l < kLanes; ++l) bits[l] = extended(static_cast<T>(values[l]));
    } else if (c.from.is_signed()) {
      for (int l = 0; l < kLanes; ++l) {
        bits[l] = extended(saturate<T>(static_cast<__int128>(static_cast<int64_t>(values[l]))));
      }
    } else {
      for (int l = 0; l < kLanes; ++l)
        bits[l] = extended(saturate<T>(static_cast<__int128>(values[l])));
    }
  });
}

// PTX ISA: a NaN becomes 0, but the type's top bit alone where an f64 or 64-bit integers take part.
void floating_to_integers(const Conversion& c, const double* values, uint64_t* bits) {
  visit_integer(c.to, [&](auto t) {
    using T = decltype(t);
    using Limits = std::numeric_limits<T>;
    const bool wide = is_f64(c.from) || c.to.bits == 64;
    const T nan = wide ? static_cast<T>(uint64_t{1} << (kBits<T> - 1)) : T{0};
    const double end = std::ldexp(1.0, Limits::digits);  // the first number that is too large
    for (int l = 0; l < kLanes; ++l) {
      const double x =
          round_to_integral(c.ftz ? flush(static_cast<float>(values[l])) : values[l], c.rounding);
      T result = nan;
      if (x >= end) {
        result = Limits::max();
      } else if (x < static_cast<double>(Limits::min())) {
        result = Limits::min();
      } else if (x == x) {
        result = static_cast<T>(x);
      }
      bits[l] = extended(result);
    }
  });
}

// What is left to do for a result in its own type.
template <class T>
T finished(const Conversion& c, T x) {
  if (c.ftz && std::is_same_v<T, float>) x = flush(x);
  if (c.sat) x = saturate_to_unit(x);
  if (c.relu) x = clamp_to_positive(x);
  return x;
}

// From doubles that are exact, or were rounded to odd, to all but f64.
template <class T, class Format>
void encode_lanes(const Conversion& c, const double* values, uint64_t* bits) {
  const Encoder<Format> encode(c.rounding, c.satfinite);
  for (int l = 0; l < kLanes; ++l) {
    bits[l] = bits_of(finished(c, from_bits<T>(encode(values[l]))));
  }
}

void to_narrower(const Conversion& c, const double* values, uint64_t* bits) {
  switch (c.to.cls) {
    case Type::Class::TFloat:
      return encode_lanes<float, TensorFloat32>(c, values, bits);
    case Type::Class::BFloat:
      return encode_lanes<BF16, BFloat16>(c, values, bits);
    default:
      return c.to.bits == 16 ? encode_lanes<F16, Binary16>(c, values, bits)
                             : encode_lanes<float, Binary32>(c, values, bits);
  }
}

void integers_to_floating(const Conversion& c, const uint64_t* values, uint64_t* bits) {
  const bool is_signed = c.from.is_signed();
  if (is_f64(c.to)) {
    const HostRounding host(c.rounding);
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t x = opaque(values[l]);
      const double y =
          is_signed ? static_cast<double>(static_cast<int64_t>(x)) : static_cast<double>(x);
      bits[l] = bits_of(finished(c, opaque(y)));
    }
    return;
  }
  double odd[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    odd[l] =
        is_signed ? integer_to_odd(static_cast<int64_t>(values[l])) : integer_to_odd(values[l]);
  }
  to_narrower(c, odd, bits);
}

void floating_to_floating(const Conversion& c, double* values, uint64_t* bits) {
  const bool flushes = c.ftz && is_f32(c.from);
  for (int l = 0; l < kLanes; ++l) {
    if (flushes) values[l] = flush(static_cast<float>(values[l]));
    if (c.to_integral) values[l] = round_to_integral(values[l], c.rounding);
  }
  if (!is_f64(c.to)) return to_narrower(c, values, bits);
  for (int l = 0; l < kLanes; ++l) bits[l] = bits_of(finished(c, values[l]));
}

void store(Warp& warp, const Slot& slot, const uint64_t* bits, LaneMask active) {
  const auto narrow = [&](auto word) {
    decltype(word) result[kLanes];
    for (int l = 0; l < kLanes; ++l) result[l] = static_cast<decltype(word)>(bits[l]);
    warp.store(slot, result, active);
  };
  switch (slot.width) {
    case 1:
      return narrow(uint8_t{});
    case 2:
      return narrow(uint16_t{});
    case 4:
      return narrow(uint32_t{});
    default:
      return narrow(uint64_t{});
  }
}

// Bits that are only kept or copied stay undefined one by one.
uint64_t undefined_result(const Conversion& c, uint64_t undefined) {
  const int spare = 64 - c.from.bits;
  if (undefined << spare == 0) return 0;
  if (c.from.is_float() || c.to.is_float() || c.sat) return fit(~uint64_t{0}, c.to);
  return fit(fit(undefined, c.from), c.to);
}

void run(Warp& warp, const Step& step, LaneMask active) {
  const auto& c = static_cast<const Conversion&>(*step.detail);
  const Slot& d = step.slots[0];
  const Slot& a = step.slots[1];
  uint64_t bits[kLanes];
  if (c.from.is_float()) {
    double values[kLanes];
    load_floating(warp, a, c.from, values);
    c.to.is_float() ? floating_to_floating(c, values, bits) : floating_to_integers(c, values, bits);
  } else {
    uint64_t values[kLanes];
    load_integers(warp, a, c.from, values);
    c.to.is_float() ? integers_to_floating(c, values, bits) : integers_to_integers(c, values, bits);
  }
  const LaneMask tainted = warp.tainted(a) & active;
  uint64_t undefined[kLanes];
  for_each_lane(tainted, [&](int l) {
    undefined[l] = undefined_result(c, warp.undefined_of<uint64_t>(a, l));
  });
  store(warp, d, bits, active);
  for_each_lane(tainted, [&](int l) { warp.set_undefined(d, l, undefined[l]); });
}

// cvt.{f16x2,bf16x2}.f32: a goes into the upper half, b into the lower.
template <class Format>
class PackPair {
 public:
  explicit PackPair(const Step& step)
      : encode_(static_cast<Rounding>(step.immediate[0]), step.immediate[1] != 0),
        relu_(step.immediate[2] != 0) {}

  uint32_t apply(float a, float b) const { return uint32_t{half(a)} << 16 | half(b); }
  uint32_t undefined(float, float, uint32_t ua, uint32_t ub) const {
    return (ua != 0 ? 0xffff0000u : 0) | (ub != 0 ? 0xffffu : 0);
  }

 private:
  uint16_t half(float x) const {
    const Narrow<Format> result{encode_(x)};
    return relu_ ? clamp_to_positive(result).bits : result.bits;
  }

  Encoder<Format> encode_;
  bool relu_;
};

// cvt.pack.sat: two saturated integers side by side, and for 8-bit ones c's low half above them.
template <class T>
struct PackSaturated {
  static uint32_t apply(int32_t a, int32_t b, uint32_t c) {
    using U = std::make_unsigned_t<T>;
    const uint32_t pair = uint32_t{static_cast<U>(saturate<T>(int64_t{a}))} << kBits<T> |
                          static_cast<U>(saturate<T>(int64_t{b}));
    return kBits<T> == 8 ? c << 16 | pair : pair;
  }
};

void bind_pack(Binder& b) {
  if (!b.take("sat")) b.unsupported("cvt.pack without .sat");
  const Type type = b.type();
  if (!is(b.type(), Type::Class::Signed, 32)) b.unsupported("sources other than .s32");
  const bool bytes = type.bits == 8;
  if (bytes && b.type() != kB32) b.unsupported("a third source other than .b32");
  if (type.is_float() || (!bytes && type.bits != 16)) b.unsupported("that type");
  b.done();
  if (b.operand_count() != (bytes ? 4 : 3)) b.unsupported("the number of operands");
  visit_integer(type, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) <= 2) {
      b.step.run = Elementwise<PackSaturated<T>, uint32_t, int32_t, int32_t, uint32_t>::run;
    }
  });
  b.step.slots = {b.destination(0, kB32), b.source(1, kB32), b.source(2, kB32),
                  bytes ? b.source(3, kB32) : b.constant(0, 4)};
}

bool take_integral_rounding(Binder& b, Rounding* rounding) {
  static const std::map<std::string, Rounding> kModes = {{"rni", Rounding::Nearest},
                                                         {"rzi", Rounding::Zero},
                                                         {"rmi", Rounding::Down},
                                                         {"rpi", Rounding::Up}};
  const auto found = kModes.find(b.next());
  if (found == kModes.end()) return false;
  *rounding = found->second;
  return b.take(b.next());
}

void bind_pair(Binder& b, const Conversion& c) {
  const bool bfloat = c.to.cls == Type::Class::BFloat;
  const bool known = c.rounding == Rounding::Nearest || c.rounding == Rounding::Zero;
  if (!is_f32(c.from) || !c.has_rounding || !known || c.ftz || c.sat) b.unsupported("this form");
  b.step.immediate[0] = static_cast<int64_t>(c.rounding);
  b.step.immediate[1] = c.satfinite;
  b.step.immediate[2] = c.relu;
  bind(b,
       bfloat ? Elementwise<PackPair<BFloat16>, uint32_t, float, float>::run
              : Elementwise<PackPair<Binary16>, uint32_t, float, float>::run,
       c.to, {c.from, c.from});
}

// The combinations that the ISA's notes on rounding and saturation allow.
void check(Binder& b, const Conversion& c) {
  const Type &from = c.from, &to = c.to;
  const bool bits = from.cls == Type::Class::Bits || to.cls == Type::Class::Bits;
  const bool tensor = to.cls == Type::Class::TFloat;
  if (bits || from.count != 1 || from.bytes() == 0 || to.bytes() == 0 ||
      from.cls == Type::Class::TFloat || (tensor && !is_f32(from))) {
    b.unsupported("a conversion between these types");
  }
  const bool both = from.is_float() && to.is_float();
  const bool loses = to.is_float() && (!from.is_float() || from.bits > to.bits || tensor ||
                                       (from.bits == to.bits && from.cls != to.cls));
  const bool same = both && from == to;
  const bool needs_integral = from.is_float() && !to.is_float();
  if ((c.to_integral && !needs_integral && !same) || (needs_integral && !c.to_integral) ||
      (loses && !c.has_rounding)) {
    b.unsupported("the rounding");
  }
  if (c.rounding == Rounding::NearestAway && !tensor) b.unsupported(".rna");
  const bool special = to.bits == 16 || tensor;  // .relu, .satfinite: f16, bf16 and tf32 from f32
  if ((c.relu || c.satfinite) && !(to.is_float() && special && is_f32(from))) {
    b.unsupported(".relu or .satfinite");
  }
  if (c.sat && to.cls != Type::Class::Float && to.is_float()) b.unsupported(".sat");
  if (c.ftz && !is_f32(from) && !is_f32(to)) b.unsupported(".ftz");
}

void bind_convert(Binder& b) {
  if (b.take("pack")) return bind_pack(b);
  auto c = std::make_shared<Conversion>();
  c->has_rounding = take_rounding(b, &c->rounding);
  if (b.take("rna")) {
    c->rounding = Rounding::NearestAway;
    c->has_rounding = true;
  }
  c->to_integral = take_integral_rounding(b, &c->rounding);
  c->ftz = b.take("ftz");
  // The ISA writes .relu and .satfinite in either order.
  for (int i = 0; i < 2; ++i) {
    c->relu = b.take("relu") || c->relu;
    c->satfinite = b.take("satfinite") || c->satfinite;
  }
  c->sat = b.take("sat");
  c->to = b.type();
  c->from = b.type();
  if (c->to.count == 2) return bind_pair(b, *c);
  check(b, *c);
  b.done();
  if (b.operand_count() != 2) b.unsupported("the number of operands");
  b.step.run = run;
  b.step.slots = {b.destination(0, c->to, true), b.source(1, c->from, true)};
  if (b.step.slots[0].width < c->to.bytes() || b.step.slots[1].width < c->from.bytes()) {
    b.unsupported("a register narrower than the type");
  }
  b.step.detail = c;
}

}  // namespace

void add_convert(Opcodes& opcodes) {
  opcodes.add("cvt", bind_convert);
}

}  // namespace emulator
