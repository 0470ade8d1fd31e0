// Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions").
//
// A sum's or product's low bits depend on no higher bits of its operands, so an undefined bit
// spoils the bits from its place upwards; of anything else here it spoils the whole result.
#include "arithmetic/integer.h"

#include <algorithm>

#include "instructions/select.h"

namespace emulator {
namespace {

using ptx::Type;

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a + b);
  }
  template <class T>
  static T undefined(T, T, T ua, T ub) {
    return upwards<T>(ua | ub);
  }
};

struct AddSaturating {
  static int32_t apply(int32_t a, int32_t b) { return saturate<int32_t>(int64_t{a} + b); }
};

struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a - b);
  }
  template <class T>
  static T undefined(T, T, T ua, T ub) {
    return upwards<T>(ua | ub);
  }
};

struct SubtractSaturating {
  static int32_t apply(int32_t a, int32_t b) { return saturate<int32_t>(int64_t{a} - b); }
};

struct MultiplyLow {
  template <class T>
  static T apply(T a, T b) {
    return multiply_low(a, b);
  }
  template <class T>
  static T undefined(T, T, T ua, T ub) {
    return upwards<T>(ua | ub);
  }
};

struct MultiplyHigh {
  template <class T>
  static T apply(T a, T b) {
    return multiply_high(a, b);
  }
};

struct MultiplyWide {
  template <class T>
  static Wide<T> apply(T a, T b) {
    return multiply_wide(a, b);
  }
  template <class T, class U>
  static Wide<U> undefined(T, T, U ua, U ub) {
    return upwards<Wide<U>>(ua | ub);
  }
};

struct MultiplyAddLow {
  template <class T>
  static T apply(T a, T b, T c) {
    return static_cast<T>(multiply_low(a, b) + c);
  }
  template <class T>
  static T undefined(T, T, T, T ua, T ub, T uc) {
    return upwards<T>(ua | ub | uc);
  }
};

struct MultiplyAddHigh {
  template <class T>
  static T apply(T a, T b, T c) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(static_cast<U>(multiply_high(a, b)) + static_cast<U>(c)));
  }
};

struct MultiplyAddHighSaturating {
  static int32_t apply(int32_t a, int32_t b, int32_t c) {
    return saturate<int32_t>(int64_t{multiply_high(a, b)} + c);
  }
};

struct MultiplyAddWide {
  template <class T>
  static Wide<T> apply(T a, T b, Wide<T> c) {
    using U = std::make_unsigned_t<Wide<T>>;
    return static_cast<Wide<T>>(static_cast<U>(multiply_wide(a, b)) + static_cast<U>(c));
  }
  template <class T, class U>
  static Wide<U> undefined(T, T, Wide<T>, U ua, U ub, Wide<U> uc) {
    return upwards<Wide<U>>(ua | ub | uc);
  }
};

// The low 24 bits of a register, extended by the type's sign.
template <class T>
T low24(T x) {
  return static_cast<T>(static_cast<T>(static_cast<uint32_t>(x) << 8) >> 8);
}

// The 48-bit product's low or high 32 bits.
template <bool kHigh>
struct Multiply24 {
  template <class T>
  static T apply(T a, T b) {
    const Wide<T> product = multiply_wide(low24(a), low24(b));
    return static_cast<T>(kHigh ? product >> 16 : product);
  }
};

template <bool kHigh>
struct MultiplyAdd24 {
  template <class T>
  static T apply(T a, T b, T c) {
    const T product = Multiply24<kHigh>::apply(a, b);
    return static_cast<T>(static_cast<uint32_t>(product) + static_cast<uint32_t>(c));
  }
};

struct MultiplyAdd24HighSaturating {
  static int32_t apply(int32_t a, int32_t b, int32_t c) {
    return saturate<int32_t>(int64_t{Multiply24<true>::apply(a, b)} + c);
  }
};

struct AbsoluteDifferenceAdd {
  template <class T>
  static T apply(T a, T b, T c) {
    using U = std::make_unsigned_t<T>;
    const U x = static_cast<U>(a), y = static_cast<U>(b);
    return static_cast<T>(static_cast<U>((a < b ? y - x : x - y) + static_cast<U>(c)));
  }
};

struct Divide {
  template <class T>
  static T apply(T a, T b) {
    return divide(a, b);
  }
};

struct Remainder {
  template <class T>
  static T apply(T a, T b) {
    return remainder(a, b);
  }
};

struct Negate {
  template <class T>
  static T apply(T a) {
    return static_cast<T>(T{0} - a);
  }
  template <class T>
  static T undefined(T, T ua) {
    return upwards(ua);
  }
};

struct Absolute {
  template <class T>
  static T apply(T a) {
    return a >> (kBits<T> - 1) != 0 ? Negate::apply(a) : a;
  }
};

struct Minimum {
  template <class T>
  static T apply(T a, T b) {
    return std::min(a, b);
  }
};
struct Maximum {
  template <class T>
  static T apply(T a, T b) {
    return std::max(a, b);
  }
};
// .relu: no less than zero.
template <class Extremum>
struct Clamped {
  template <class T>
  static T apply(T a, T b) {
    return std::max(Extremum::apply(a, b), T{0});
  }
};

template <bool kSignedA, bool kSignedB, int kCount>
int32_t dot(uint32_t a, uint32_t b, uint32_t c) {
  constexpr int kWidthA = 32 / kCount;
  const auto extract = [](uint32_t word, int at, int width, bool is_signed) {
    const uint32_t top = word << (32 - width - at * width);
    return is_signed ? int64_t{static_cast<int32_t>(top) >> (32 - width)}
                     : int64_t{top >> (32 - width)};
  };
  int64_t sum = 0;
  for (int i = 0; i < kCount; ++i) {
    sum += extract(a, i, kWidthA, kSignedA) * extract(b, i, 8, kSignedB);
  }
  return static_cast<int32_t>(c + static_cast<uint32_t>(sum));
}

// dp4a: four bytes by four bytes.
template <bool kSignedA, bool kSignedB>
struct Dot4 {
  static int32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    return dot<kSignedA, kSignedB, 4>(a, b, c);
  }
};
// dp2a: two halves by the low or high two bytes.
template <bool kSignedA, bool kSignedB, bool kHigh>
struct Dot2 {
  static int32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    return dot<kSignedA, kSignedB, 2>(a, kHigh ? b >> 16 : b, c);
  }
};

Type widened(const Binder& binder, Type type) {
  if (type.bits != 16 && type.bits != 32) binder.unsupported("a product of that width");
  type.bits *= 2;
  return type;
}

bool is(const Type& type, Type::Class cls, int bits) {
  return type == Type{cls, bits, 1};
}
bool is_s32(const Type& type) {
  return is(type, Type::Class::Signed, 32);
}

template <class Op, class Saturating>
void bind_sum(Binder& b) {
  if (b.next() == "cc") return bind_carry(b);
  const bool sat = b.take("sat");
  const Type type = b.type();
  Handler run = for_integer_words(type, [](auto t) { return uniform<1, Op, decltype(t), 2>(); });
  if (sat) run = is_s32(type) ? Elementwise<Saturating, int32_t, int32_t, int32_t>::run : nullptr;
  // Of the sums only add has packed forms.
  const bool packed = type.count == 2 && !type.is_float() && std::is_same_v<Op, Add> && !sat;
  if (packed) run = uniform<2, Op, uint16_t, 2>();
  bind(b, run, type, {type, type});
}

enum class Part { Low, High, Wide };

Part take_part(Binder& b) {
  if (b.take("lo")) return Part::Low;
  if (b.take("hi")) return Part::High;
  if (b.take("wide")) return Part::Wide;
  b.unsupported("a product without .lo, .hi or .wide");
}

void bind_multiply(Binder& b) {
  const Part part = take_part(b);
  const Type type = b.type();
  Handler run = nullptr;
  Type result = type;
  switch (part) {
    case Part::Low:
      run =
          for_integer_words(type, [](auto t) { return uniform<1, MultiplyLow, decltype(t), 2>(); });
      break;
    case Part::High:
      run = for_integers(type, [](auto t) { return uniform<1, MultiplyHigh, decltype(t), 2>(); });
      break;
    case Part::Wide:
      result = widened(b, type);
      run = for_integers(type, [](auto t) -> Handler {
        using T = decltype(t);
        if constexpr (sizeof(T) < 8) return Elementwise<MultiplyWide, Wide<T>, T, T>::run;
        return nullptr;
      });
      break;
  }
  bind(b, run, result, {type, type});
}

void bind_multiply_add(Binder& b) {
  if (b.instruction.has("cc")) return bind_carry(b);
  const Part part = take_part(b);
  const bool sat = b.take("sat");
  const Type type = b.type();
  Handler run = nullptr;
  Type result = type;
  switch (part) {
    case Part::Low:
      run = for_integer_words(type,
                              [](auto t) { return uniform<1, MultiplyAddLow, decltype(t), 3>(); });
      break;
    case Part::High:
      run =
          for_integers(type, [](auto t) { return uniform<1, MultiplyAddHigh, decltype(t), 3>(); });
      break;
    case Part::Wide:
      result = widened(b, type);
      run = for_integers(type, [](auto t) -> Handler {
        using T = decltype(t);
        if constexpr (sizeof(T) < 8)
          return Elementwise<MultiplyAddWide, Wide<T>, T, T, Wide<T>>::run;
        return nullptr;
      });
      break;
  }
  if (sat) {
    run = part == Part::High && is_s32(type) ? uniform<1, MultiplyAddHighSaturating, int32_t, 3>()
                                             : nullptr;
  }
  bind(b, run, result, {type, type, result});
}

template <template <bool> class Op, int Sources>
Handler for_24(const Type& type, Part part) {
  if (type.bits != 32 || part == Part::Wide) return nullptr;
  return for_integers(type, [&](auto t) -> Handler {
    using T = decltype(t);
    if constexpr (sizeof(T) == 4) {
      return part == Part::High ? uniform<1, Op<true>, T, Sources>()
                                : uniform<1, Op<false>, T, Sources>();
    }
    return nullptr;
  });
}

void bind_multiply24(Binder& b) {
  const Part part = take_part(b);
  const Type type = b.type();
  bind(b, for_24<Multiply24, 2>(type, part), type, {type, type});
}

void bind_multiply_add24(Binder& b) {
  const Part part = take_part(b);
  const bool sat = b.take("sat");
  const Type type = b.type();
  Handler run = for_24<MultiplyAdd24, 3>(type, part);
  if (sat) {
    run = part == Part::High && is_s32(type) ? uniform<1, MultiplyAdd24HighSaturating, int32_t, 3>()
                                             : nullptr;
  }
  bind(b, run, type, {type, type, type});
}

// Instructions of one type and no modifiers, the sign of which matters.
template <class Op, int Sources>
void bind_plain(Binder& b) {
  const Type type = b.type();
  const Handler run =
      for_integers(type, [](auto t) { return uniform<1, Op, decltype(t), Sources>(); });
  if constexpr (Sources == 2) {
    bind(b, run, type, {type, type});
  } else {
    bind(b, run, type, {type, type, type});
  }
}

template <class Op>
void bind_sign(Binder& b) {  // abs, neg: of signed types only
  const Type type = b.type();
  const Handler run = type.is_signed()
                          ? for_words(type, [](auto t) { return uniform<1, Op, decltype(t), 1>(); })
                          : nullptr;
  bind(b, run, type, {type});
}

template <class Op>
void bind_extremum(Binder& b) {
  bool relu = b.take("relu");
  const Type type = b.type();
  relu = b.take("relu") || relu;  // the ISA's syntax and its example differ in the order
  Handler run = nullptr;
  if (type.count == 2 && type.bits == 16) {
    if (type.is_signed())
      run = relu ? uniform<2, Clamped<Op>, int16_t, 2>() : uniform<2, Op, int16_t, 2>();
    if (type.cls == Type::Class::Unsigned && !relu) run = uniform<2, Op, uint16_t, 2>();
  } else if (relu) {
    run = is_s32(type) ? uniform<1, Clamped<Op>, int32_t, 2>() : nullptr;
  } else {
    run = for_integers(type, [](auto t) { return uniform<1, Op, decltype(t), 2>(); });
  }
  bind(b, run, type, {type, type});
}

template <template <bool, bool> class Dot>
void bind_dot(Binder& b) {
  const Type x = b.type(), y = b.type();
  if (x.is_float() || y.is_float() || x.bytes() != 4 || y.bytes() != 4) b.unsupported("this form");
  constexpr Handler kRun[2][2] = {
      {uniform<1, Dot<false, false>, uint32_t, 3>(), uniform<1, Dot<false, true>, uint32_t, 3>()},
      {uniform<1, Dot<true, false>, uint32_t, 3>(), uniform<1, Dot<true, true>, uint32_t, 3>()}};
  bind(b, kRun[x.is_signed()][y.is_signed()], kB32, {x, y, kB32});
}

template <bool kSignedA, bool kSignedB>
using Dot2Low = Dot2<kSignedA, kSignedB, false>;
template <bool kSignedA, bool kSignedB>
using Dot2High = Dot2<kSignedA, kSignedB, true>;

void bind_dot2(Binder& b) {
  if (b.take("lo")) return bind_dot<Dot2Low>(b);
  if (b.take("hi")) return bind_dot<Dot2High>(b);
  b.unsupported("neither .lo nor .hi");
}

template <Bind bind_integer>
void either(Binder& b) {
  is_floating(b) ? bind_floating(b) : bind_integer(b);
}

}  // namespace

void add_integer(Opcodes& opcodes) {
  opcodes.add("add", either<bind_sum<Add, AddSaturating>>);
  opcodes.add("sub", either<bind_sum<Subtract, SubtractSaturating>>);
  opcodes.add("mul", either<bind_multiply>);
  opcodes.add("mad", either<bind_multiply_add>);
  opcodes.add("div", either<bind_plain<Divide, 2>>);
  opcodes.add("abs", either<bind_sign<Absolute>>);
  opcodes.add("neg", either<bind_sign<Negate>>);
  opcodes.add("min", either<bind_extremum<Minimum>>);
  opcodes.add("max", either<bind_extremum<Maximum>>);
  opcodes.add("rem", bind_plain<Remainder, 2>);
  opcodes.add("sad", bind_plain<AbsoluteDifferenceAdd, 3>);
  opcodes.add("mul24", bind_multiply24);
  opcodes.add("mad24", bind_multiply_add24);
  opcodes.add("dp4a", bind_dot<Dot4>);
  opcodes.add("dp2a", bind_dot2);
  for (const char* root : {"addc", "subc", "madc"}) opcodes.add(root, bind_carry);
}

}  // namespace emulator
