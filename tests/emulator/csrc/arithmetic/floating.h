// Floating-point operations on f32, f64, f16 and bf16 alike, correctly rounded; and what PTX's
// modifiers do to their operands and results.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "arithmetic/half.h"
#include "arithmetic/rounding.h"

namespace emulator {

// One f16 or bf16 value, as bits.
template <class Format>
struct Narrow {
  typename Format::Bits bits;
};
using F16 = Narrow<Binary16>;
using BF16 = Narrow<BFloat16>;

inline uint32_t bits_of(float x) {
  return bit_cast<uint32_t>(x);
}
inline uint64_t bits_of(double x) {
  return bit_cast<uint64_t>(x);
}
template <class Format>
inline uint16_t bits_of(Narrow<Format> x) {
  return x.bits;
}

// The value, exactly, in a type that the host computes with.
inline float value_of(float x) {
  return x;
}
inline double value_of(double x) {
  return x;
}
template <class Format>
inline float value_of(Narrow<Format> x) {
  return decode<Format>(x.bits);
}

// The T of these bits.
template <class T, class Word>
inline T from_bits(Word bits) {
  if constexpr (std::is_floating_point_v<T>) {
    return bit_cast<T>(bits);
  } else {
    return T{bits};
  }
}

// The T nearest to a double; f32 results that were computed in double are rounded here, once.
template <class T>
struct Rounded {
  static T from(double x) { return static_cast<T>(x); }
};
template <class Format>
struct Rounded<Narrow<Format>> {
  static Narrow<Format> from(double x) { return {encode<Format>(x)}; }
};

template <class T>
using BitsOf = decltype(bits_of(std::declval<T>()));
template <class T>
constexpr BitsOf<T> kSignBit = static_cast<BitsOf<T>>(BitsOf<T>{1} << (8 * sizeof(T) - 1));

template <class T>
inline bool is_nan(T x) {
  return value_of(x) != value_of(x);
}
template <class T>
inline bool sign_of(T x) {
  return (bits_of(x) & kSignBit<T>) != 0;
}
template <class T>
inline T with_sign(T x, bool negative) {
  const auto magnitude = static_cast<BitsOf<T>>(bits_of(x) & ~kSignBit<T>);
  return from_bits<T>(static_cast<BitsOf<T>>(magnitude | (negative ? kSignBit<T> : 0)));
}

// The NaN that PTX's instructions make. Those of f64 keep the payload of an operand, as the host
// does.
inline float canonical(float x) {
  return x == x ? x : bit_cast<float>(Binary32::kNaN);
}
inline double canonical(double x) {
  return x;
}
template <class Format>
inline Narrow<Format> canonical(Narrow<Format> x) {
  return is_nan(x) ? Narrow<Format>{Format::kNaN} : x;
}

// .ftz: a subnormal becomes the zero of its sign.
inline float flush(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}
inline double flush(double x) {
  return std::fabs(x) < std::numeric_limits<double>::min() ? std::copysign(0.0, x) : x;
}
template <class Format>
inline Narrow<Format> flush(Narrow<Format> x) {
  constexpr int kSmallestNormal = 1 << (Format::kPrecision - 1);
  if ((x.bits & 0x7fff) >= kSmallestNormal) return x;
  return {static_cast<uint16_t>(x.bits & 0x8000)};
}

// .sat: into [0, 1]; a NaN and both zeros become +0.
template <class T>
inline T saturate_to_unit(T x) {
  const auto value = value_of(x);
  if (!(value > 0)) return from_bits<T>(BitsOf<T>{0});
  return value < 1 ? x : Rounded<T>::from(1.0);
}

// .relu: what is negative, -0 too, becomes +0.
template <class T>
inline T clamp_to_positive(T x) {
  return value_of(x) <= 0 ? from_bits<T>(BitsOf<T>{0}) : x;
}

inline float add(float a, float b) {
  return a + b;
}
inline double add(double a, double b) {
  return a + b;
}
template <class Format>
inline Narrow<Format> add(Narrow<Format> a, Narrow<Format> b) {
  return {encode<Format>(add_to_odd(value_of(a), value_of(b)))};
}

inline float multiply(float a, float b) {
  return a * b;
}
inline double multiply(double a, double b) {
  return a * b;
}
template <class Format>
inline Narrow<Format> multiply(Narrow<Format> a, Narrow<Format> b) {
  return {encode<Format>(double{value_of(a)} * double{value_of(b)})};  // the product is exact
}

inline float multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}
template <class Format>
inline Narrow<Format> multiply_add(Narrow<Format> a, Narrow<Format> b, Narrow<Format> c) {
  return {encode<Format>(fma_to_odd(value_of(a), value_of(b), value_of(c)))};
}

// Minimum and maximum order -0 before +0, and NaNs nowhere.
template <class T>
inline bool precedes(T a, T b) {
  return value_of(a) < value_of(b) || (value_of(a) == value_of(b) && sign_of(a) && !sign_of(b));
}

}  // namespace emulator
