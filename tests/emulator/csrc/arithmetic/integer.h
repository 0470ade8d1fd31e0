// Integer arithmetic as PTX defines it: everything wraps, nothing is undefined.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

namespace emulator {

// The integer of twice the width, of the same signedness.
template <class T>
struct WideOf;
template <>
struct WideOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct WideOf<int16_t> {
  using type = int32_t;
};
template <>
struct WideOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct WideOf<int32_t> {
  using type = int64_t;
};
template <>
struct WideOf<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct WideOf<int64_t> {
  using type = __int128;
};
template <class T>
using Wide = typename WideOf<T>::type;

template <class T>
constexpr int kBits = 8 * sizeof(T);

template <class T>
inline Wide<T> multiply_wide(T a, T b) {
  return static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b);
}
template <class T>
inline T multiply_low(T a,
                      T b) {  // unsigned, so that it wraps; in Wide, since uint16_t promotes to int
  static_assert(std::is_unsigned_v<T>);
  return static_cast<T>(multiply_wide(a, b));
}
template <class T>
inline T multiply_high(T a, T b) {
  return static_cast<T>(multiply_wide(a, b) >> kBits<T>);
}

template <class T, class Larger>
inline T saturate(Larger x) {
  if (x < std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
  if (x > std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}

// Division by zero "yields an unspecified, machine-specific value" (PTX ISA, "div"): quotient and
// remainder alike are all ones here, as in the code that ptxas emits for them.
template <class T>
inline T divide(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) {  // the least number's negation wraps
    return static_cast<T>(std::make_unsigned_t<T>{0} - static_cast<std::make_unsigned_t<T>>(a));
  }
  return static_cast<T>(a / b);
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}

// Shifts by any amount: past the width nothing of the value is left but the sign.
template <class T>
inline T shift_left(T a, uint32_t by) {
  return by < kBits<T> ? static_cast<T>(a << by) : T{0};
}
template <class T>
inline T shift_right(T a, uint32_t by) {
  constexpr uint32_t kLast = kBits<T> - 1;
  return by <= kLast ? static_cast<T>(a >> by) : static_cast<T>(a >> kLast >> 1);
}

template <class T>
inline T reverse_bits(T a) {
  T reversed = 0;
  for (int i = 0; i < kBits<T>; ++i) reversed |= static_cast<T>((a >> i & 1) << (kBits<T> - 1 - i));
  return reversed;
}

// The bits at and above the lowest one that is set: where a carry out of an undefined bit may
// reach.
template <class T>
inline T upwards(T undefined) {
  static_assert(std::is_unsigned_v<T>);
  return static_cast<T>(undefined | (T{0} - undefined));
}

}  // namespace emulator
