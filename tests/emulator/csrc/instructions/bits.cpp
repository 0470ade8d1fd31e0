// Counting, finding and moving bits (PTX ISA, "Integer Arithmetic Instructions": popc to szext).
//
// What only moves bits moves their undefinedness in the same way; an undefined position or length
// spoils the whole result.
#include <algorithm>

#include "arithmetic/integer.h"
#include "instructions/select.h"

namespace emulator {
namespace {

using ptx::Type;

constexpr uint32_t kNone = ~uint32_t{0};

// The place of the highest bit that is set.
template <class U>
uint32_t highest_bit(U x) {
  static_assert(std::is_unsigned_v<U>);
  return x == 0 ? kNone : 63 - static_cast<uint32_t>(__builtin_clzll(x));
}

struct CountOnes {
  template <class U>
  static uint32_t apply(U a) {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};

struct CountLeadingZeros {
  template <class U>
  static uint32_t apply(U a) {
    return kBits<U> - 1 - highest_bit(a);
  }  // none wraps to the width
};

// The highest bit that differs from the sign, or how far it is from the top.
template <bool kShiftAmount>
struct FindHighest {
  template <class T>
  static uint32_t apply(T a) {
    using U = std::make_unsigned_t<T>;
    const uint32_t at = highest_bit(static_cast<U>(a < 0 ? static_cast<T>(~a) : a));
    return kShiftAmount && at != kNone ? kBits<U> - 1 - at : at;
  }
};

struct Reverse {
  template <class U>
  static U apply(U a) {
    return reverse_bits(a);
  }
  template <class U>
  static U undefined(U, U ua) {
    return reverse_bits(ua);
  }
};

// The lowest `count` bits, any number of them.
template <class U>
U low_mask(uint32_t count) {
  return static_cast<U>(~shift_left(static_cast<U>(~U{0}), count));
}

// `length` bits from `position` upwards, extended by zeros or, for signed types, by the last of
// them: the sign bit of the field, or of a where the field reaches past it.
struct ExtractField {
  template <class T>
  static T apply(T a, uint32_t position, uint32_t length) {
    using U = std::make_unsigned_t<T>;
    position &= 0xff;
    length &= 0xff;
    const U field = shift_right(static_cast<U>(a), position) & low_mask<U>(length);
    if (std::is_unsigned_v<T> || length == 0) return static_cast<T>(field);
    const uint32_t last = std::min<uint32_t>(position + length - 1, kBits<T> - 1);
    const bool sign = (static_cast<U>(a) >> last & 1) != 0;
    const uint32_t copied =
        position < kBits<T> ? std::min<uint32_t>(length, kBits<T> - position) : 0;
    return static_cast<T>(sign ? field | ~low_mask<U>(copied) : field);
  }
  template <class T, class U>
  static U undefined(T, uint32_t position, uint32_t length, U ua, uint32_t uposition,
                     uint32_t ulength) {
    if (((uposition | ulength) & 0xff) != 0) return static_cast<U>(~U{0});
    return static_cast<U>(apply(static_cast<T>(ua), position, length));
  }
};

struct InsertField {
  template <class U>
  static U apply(U a, U b, uint32_t position, uint32_t length) {
    const U field = shift_left(low_mask<U>(length & 0xff), position & 0xff);
    return static_cast<U>((b & ~field) | (shift_left(a, position & 0xff) & field));
  }
  template <class U>
  static U undefined(U, U, uint32_t position, uint32_t length, U ua, U ub, uint32_t uposition,
                     uint32_t ulength) {
    if (((uposition | ulength) & 0xff) != 0) return static_cast<U>(~U{0});
    return apply(ua, ub, position, length);
  }
};

// A mask of `width` bits from `position` upwards. Amounts of 32 and more are taken modulo 32
// (.wrap), or give no mask at all, or all bits above the position (.clamp).
template <bool kClamp>
struct MakeMask {
  static uint32_t apply(uint32_t position, uint32_t width) {
    if (kClamp && position >= 32) return 0;
    const uint32_t from = position & 31;
    const uint32_t count = kClamp ? std::min(width, uint32_t{32}) : width & 31;
    return shift_left(low_mask<uint32_t>(count), from);
  }
};

// The lowest `count` bits of a, extended by zeros or by their sign.
template <bool kClamp>
struct Extend {
  template <class T>
  static T apply(T a, uint32_t count) {
    if (count >= 32 && kClamp) return a;
    count &= 31;
    if (count == 0) return 0;
    const uint32_t top = static_cast<uint32_t>(a) << (32 - count);
    return static_cast<T>(static_cast<T>(top) >> (32 - count));
  }
  template <class T>
  static uint32_t undefined(T, uint32_t count, uint32_t ua, uint32_t ucount) {
    if (ucount != 0) return ~uint32_t{0};
    return static_cast<uint32_t>(apply(static_cast<T>(ua), count));
  }
};

// The |offset|-th set bit from `base` on, upwards or downwards; offset 0 asks for the base itself.
// A base past 31, undefined by the ISA, finds nothing.
struct FindNth {
  static uint32_t apply(uint32_t mask, uint32_t base, int32_t offset) {
    if (base > 31) return kNone;
    if (offset == 0) return (mask >> base & 1) != 0 ? base : kNone;
    const int step = offset > 0 ? 1 : -1;
    int64_t wanted = offset > 0 ? int64_t{offset} : -int64_t{offset};
    for (int at = static_cast<int>(base); at >= 0 && at < 32; at += step) {
      if ((mask >> at & 1) != 0 && --wanted == 0) return static_cast<uint32_t>(at);
    }
    return kNone;
  }
};

bool is_bits(const Type& type) {
  return type.cls == Type::Class::Bits && type.bits >= 32;
}

template <class Op>
void bind_count(Binder& b) {
  const Type type = b.type();
  const Handler run =
      is_bits(type)
          ? for_words(type, [](auto t) { return Elementwise<Op, uint32_t, decltype(t)>::run; })
          : nullptr;
  bind(b, run, kU32, {type});
}

template <class Op>
Handler find_highest(const Type& type) {
  return for_integers(
      type, [](auto t) -> Handler { return Elementwise<Op, uint32_t, decltype(t)>::run; });
}

void bind_find_highest(Binder& b) {
  const bool shift_amount = b.take("shiftamt");
  const Type type = b.type();
  if (type.bits < 32) b.unsupported("16 bits");
  bind(
      b,
      shift_amount ? find_highest<FindHighest<true>>(type) : find_highest<FindHighest<false>>(type),
      kU32, {type});
}

void bind_reverse(Binder& b) {
  const Type type = b.type();
  const Handler run =
      is_bits(type) ? for_words(type, [](auto t) { return uniform<1, Reverse, decltype(t), 1>(); })
                    : nullptr;
  bind(b, run, type, {type});
}

void bind_extract(Binder& b) {
  const Type type = b.type();
  if (type.bits < 32) b.unsupported("16 bits");
  const Handler run = for_integers(type, [](auto t) -> Handler {
    using T = decltype(t);
    return Elementwise<ExtractField, T, T, uint32_t, uint32_t>::run;
  });
  bind(b, run, type, {type, kU32, kU32});
}

void bind_insert(Binder& b) {
  const Type type = b.type();
  const Handler run =
      is_bits(type) ? for_words(type,
                                [](auto t) -> Handler {
                                  using U = decltype(t);
                                  return Elementwise<InsertField, U, U, U, uint32_t, uint32_t>::run;
                                })
                    : nullptr;
  bind(b, run, type, {type, type, kU32, kU32});
}

// .clamp or .wrap, one of which must be given.
bool take_clamp(Binder& b) {
  const bool clamp = b.take("clamp");
  if (!clamp && !b.take("wrap")) b.unsupported("neither .clamp nor .wrap");
  return clamp;
}

void bind_mask(Binder& b) {
  const bool clamp = take_clamp(b);
  if (b.type() != kB32) b.unsupported("another type than .b32");
  bind(b,
       clamp ? uniform<1, MakeMask<true>, uint32_t, 2>()
             : uniform<1, MakeMask<false>, uint32_t, 2>(),
       kB32, {kU32, kU32});
}

template <bool kClamp>
Handler extend(const Type& type) {
  return type.is_signed() ? Elementwise<Extend<kClamp>, int32_t, int32_t, uint32_t>::run
                          : Elementwise<Extend<kClamp>, uint32_t, uint32_t, uint32_t>::run;
}

void bind_extend(Binder& b) {
  const bool clamp = take_clamp(b);
  const Type type = b.type();
  if (type.bits != 32 || type.is_float()) b.unsupported("a type of other than 32 bits");
  bind(b, clamp ? extend<true>(type) : extend<false>(type), type, {type, kU32});
}

void bind_find_nth(Binder& b) {
  if (b.type() != kB32) b.unsupported("another type than .b32");
  bind(b, Elementwise<FindNth, uint32_t, uint32_t, uint32_t, int32_t>::run, kB32,
       {kB32, kB32, kB32});
}

}  // namespace

void add_bits(Opcodes& opcodes) {
  opcodes.add("popc", bind_count<CountOnes>);
  opcodes.add("clz", bind_count<CountLeadingZeros>);
  opcodes.add("bfind", bind_find_highest);
  opcodes.add("brev", bind_reverse);
  opcodes.add("bfe", bind_extract);
  opcodes.add("bfi", bind_insert);
  opcodes.add("bmsk", bind_mask);
  opcodes.add("szext", bind_extend);
  opcodes.add("fns", bind_find_nth);
}

}  // namespace emulator
