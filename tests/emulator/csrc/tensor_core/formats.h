// The number formats of tensor-core operands, as fp32 values: every one of them is exact in fp32.
#pragma once

#include <cstdint>

#include "arithmetic/half.h"

namespace emulator {

enum class TensorFormat : uint8_t { F16, BF16, TF32 };

constexpr int bytes_of(TensorFormat format) {
  return format == TensorFormat::TF32 ? 4 : 2;
}

// The exponent of the smallest normal number; subnormals have it too.
constexpr int min_exponent(TensorFormat format) {
  return format == TensorFormat::F16 ? Binary16::kMinExponent : Binary32::kMinExponent;
}

// An operand of 16 bits is in the lower half.
template <TensorFormat format>
inline float operand_value(uint32_t bits) {
  switch (format) {
    case TensorFormat::F16:
      return decode<Binary16>(static_cast<uint16_t>(bits));
    case TensorFormat::BF16:
      return decode<BFloat16>(static_cast<uint16_t>(bits));
    case TensorFormat::TF32:
      // Tensor cores do not look at the last 13 bits, so a plain fp32 operand is truncated.
      return decode<TensorFloat32>(bits & ~uint32_t{0x1fff});
  }
}

}  // namespace emulator
