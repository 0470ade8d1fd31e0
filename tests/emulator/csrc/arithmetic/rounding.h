// Rounding: the modes of PTX, and double-precision results that can be rounded once more without
// harm.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

// A value's bits read as another type of the same size.
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: the sizes must agree");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// PTX ISA, "Rounding Modifiers": .rn, .rna, .rz, .rm, .rp; .rni and the like round to integers
// alike.
enum class Rounding : uint8_t { Nearest, NearestAway, Zero, Down, Up };

// Rounds to an integer, which the double holds exactly.
inline double round_to_integral(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::Nearest:
      return __builtin_roundeven(x);
    case Rounding::NearestAway: {
      // Not trunc(x + 0.5), whose sum may itself be rounded up.
      const double whole = std::trunc(x);
      return std::fabs(x - whole) < 0.5 ? whole : whole + std::copysign(1.0, x);
    }
    case Rounding::Zero:
      return std::trunc(x);
    case Rounding::Down:
      return std::floor(x);
    case Rounding::Up:
      return std::ceil(x);
  }
  return x;
}

// The host's own f32 and f64 arithmetic in another rounding mode for as long as this lives. What is
// computed under it has to pass through `opaque` on both sides, or the compiler may move it out.
class HostRounding {
 public:
  explicit HostRounding(Rounding rounding) : before_(std::fegetround()) {
    const int mode = rounding == Rounding::Zero   ? FE_TOWARDZERO
                     : rounding == Rounding::Down ? FE_DOWNWARD
                     : rounding == Rounding::Up   ? FE_UPWARD
                                                  : FE_TONEAREST;
    if (mode != before_) std::fesetround(mode);
    changed_ = mode != before_;
  }
  ~HostRounding() {
    if (changed_) std::fesetround(before_);
  }
  HostRounding(const HostRounding&) = delete;
  HostRounding& operator=(const HostRounding&) = delete;

 private:
  int before_;
  bool changed_;
};

// The same value, of which the compiler knows nothing, read at this point of the program.
template <class T>
inline T opaque(T x) {
  asm volatile("" : "+m"(x) : : "memory");
  return x;
}

// Rounding to odd (Boldo and Melquiond): an inexact result becomes its neighbour with an odd last
// bit, so that it is never a tie, nor exact, for a format of two bits less. Rounding it to such a
// format, in any mode, gives what rounding the exact value would.
//
// `rounded` is the exact value rounded to nearest and `error` the exact rest, exact = rounded +
// error.
inline double round_to_odd(double rounded, double error) {
  const auto bits = bit_cast<uint64_t>(rounded);
  const bool inexact = error > 0 || error < 0;  // not for a NaN, which infinities leave behind
  const bool even = (bits & 1) == 0;
  const bool outwards = (error > 0) == (rounded > 0);
  const uint64_t step = outwards ? 1 : ~uint64_t{0};
  return bit_cast<double>(bits + (inexact && even ? step : 0));
}

// a + b to odd, for sums that do not overflow (Knuth's exact error of a sum).
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  const double of_b = sum - a;
  return round_to_odd(sum, (a - (sum - of_b)) + (b - of_b));
}

// a * b + c to odd, for factors of at most 26 bits, whose product is exact.
inline double fma_to_odd(double a, double b, double c) {
  return add_to_odd(a * b, c);
}

// An integer to odd: the bits that a double cannot hold are gathered in the last one that it can.
inline double integer_to_odd(uint64_t x) {
  constexpr uint64_t kLow = (uint64_t{1} << 11) - 1;
  if (x < (uint64_t{1} << 53)) return static_cast<double>(x);
  const uint64_t high = x & ~kLow;
  return static_cast<double>(high | ((x & kLow) != 0 ? kLow + 1 : 0));
}
inline double integer_to_odd(int64_t x) {
  return x < 0 ? -integer_to_odd(uint64_t{0} - static_cast<uint64_t>(x))
               : integer_to_odd(static_cast<uint64_t>(x));
}

}  // namespace emulator
