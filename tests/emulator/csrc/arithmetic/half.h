// The narrow floating-point formats, f16, bf16 and tf32, and f32 as a destination: values to bits
// and back.
#pragma once

#include <cstdint>
#include <limits>

#include "arithmetic/rounding.h"

namespace emulator {

// A format's significand bits (the hidden one counts), its normal exponents, and the NaN that PTX
// makes.
struct Binary16 {
  using Bits = uint16_t;
  static constexpr int kPrecision = 11;
  static constexpr int kMinExponent = -14;
  static constexpr double kMax = 65504.0;
  static constexpr Bits kNaN = 0x7fff;
};
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kPrecision = 8;
  static constexpr int kMinExponent = -126;
  static constexpr double kMax = 0x1.fep127;
  static constexpr Bits kNaN = 0x7fff;
};
struct TensorFloat32 {  // the f32 whose last 13 bits are zero
  using Bits = uint32_t;
  static constexpr int kPrecision = 11;
  static constexpr int kMinExponent = -126;
  static constexpr double kMax = 0x1.ffcp127;
  static constexpr Bits kNaN = 0x7fffffff;
};
struct Binary32 {
  using Bits = uint32_t;
  static constexpr int kPrecision = 24;
  static constexpr int kMinExponent = -126;
  static constexpr double kMax = 0x1.fffffep127;
  static constexpr Bits kNaN = 0x7fffffff;
};

// The value of a pattern; exact in every format. A NaN stays one.
template <class Format>
inline float decode(typename Format::Bits bits) {
  if constexpr (sizeof(bits) == 4) {
    return bit_cast<float>(bits);
  } else if constexpr (Format::kMinExponent == -126) {
    return bit_cast<float>(uint32_t{bits} << 16);
  } else {
    // With its exponent field read as an f32's, an f16 comes out 2^112 too small, subnormals too.
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaNs
    const auto scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t sign = (bits & 0x8000u) << 16;
    return bit_cast<float>(sign | ((bits & 0x7c00u) == 0x7c00u ? special : scaled));
  }
}

// Rounds doubles to a format, once; a double that was rounded to odd stands for the exact value.
template <class Format>
class Encoder {
 public:
  using Bits = typename Format::Bits;

  // `satfinite`: what would become infinite becomes the format's largest number.
  explicit Encoder(Rounding rounding = Rounding::Nearest, bool satfinite = false)
      : rounding_(rounding), satfinite_(satfinite) {
    const double infinity = std::numeric_limits<double>::infinity();
    const bool toward_zero = rounding == Rounding::Zero;
    above_ = satfinite || toward_zero || rounding == Rounding::Down ? Format::kMax : infinity;
    below_ = satfinite || toward_zero || rounding == Rounding::Up ? -Format::kMax : -infinity;
  }

  Bits operator()(double x) const {
    double rounded = quantise(x);
    const bool was_finite = std::fabs(x) <= std::numeric_limits<double>::max();
    if (std::fabs(rounded) > Format::kMax && (was_finite || satfinite_)) {
      rounded = rounded > 0 ? above_ : below_;
    }
    return x == x ? pack(static_cast<float>(rounded)) : Format::kNaN;
  }

 private:
  // The nearest multiple of the last place that the format has at x, by rounding x in units of it.
  double quantise(double x) const {
    constexpr int kBias = 1023, kFraction = 52;
    const auto field = static_cast<int64_t>(bit_cast<uint64_t>(x) >> kFraction & 0x7ff);
    const int64_t normal =
        field > Format::kMinExponent + kBias ? field : Format::kMinExponent + kBias;
    const int64_t place = normal - (Format::kPrecision - 1);  // biased
    const auto to_units = bit_cast<double>(static_cast<uint64_t>(2 * kBias - place) << kFraction);
    const auto unit = bit_cast<double>(static_cast<uint64_t>(place) << kFraction);
    return round_to_integral(x * to_units, rounding_) * unit;
  }

  // A value that the format holds exactly.
  static Bits pack(float value) {
    if constexpr (sizeof(Bits) == 4) {
      return bit_cast<uint32_t>(value);
    } else if constexpr (Format::kMinExponent == -126) {
      return static_cast<Bits>(bit_cast<uint32_t>(value) >> 16);
    } else {
      // The inverse of `decode`; infinity, which scaling leaves as it is, has a smaller exponent
      // field.
      const uint32_t scaled = bit_cast<uint32_t>(value * 0x1p-112f);
      const uint32_t magnitude =
          std::fabs(value) > Binary16::kMax ? 0x7c00u : scaled >> 13 & 0x7fffu;
      return static_cast<Bits>((scaled >> 16 & 0x8000u) | magnitude);
    }
  }

  Rounding rounding_;
  bool satfinite_;
  double above_, below_;
};

template <class Format>
inline typename Format::Bits encode(double x, Rounding rounding = Rounding::Nearest) {
  return Encoder<Format>(rounding)(x);
}

}  // namespace emulator
