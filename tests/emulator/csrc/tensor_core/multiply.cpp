#include "tensor_core/multiply.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tensor_core/fragments.h"

namespace emulator {

namespace {

// Eight columns of D at a time; GCC and Clang split the vector where the machine has narrower ones.
using Columns = float __attribute__((vector_size(32), aligned(4), may_alias));
static_assert(sizeof(Columns) == kBlockColumns * sizeof(float));

// Products of 16-bit and tf32 numbers are exact in fp32 unless they underflow, so that a fused
// multiply-add would round alike.
void multiply_plain(const float* a, const float* b, float* d, int n, int k) {
  constexpr int kRowsAtOnce = 8;  // independent sums hide the latency of the additions
  for (int column = 0; column < n; column += kBlockColumns) {
    for (int row = 0; row < kTileRows; row += kRowsAtOnce) {
      Columns sum[kRowsAtOnce];
      for (int r = 0; r < kRowsAtOnce; ++r) {
        sum[r] = *reinterpret_cast<const Columns*>(d + (row + r) * n + column);
      }
      for (int i = 0; i < k; ++i) {
        const Columns right = *reinterpret_cast<const Columns*>(b + i * n + column);
        for (int r = 0; r < kRowsAtOnce; ++r) sum[r] += a[(row + r) * k + i] * right;
      }
      for (int r = 0; r < kRowsAtOnce; ++r) {
        *reinterpret_cast<Columns*>(d + (row + r) * n + column) = sum[r];
      }
    }
  }
}

// |significand| < 2, with 23 fraction bits, times 2^exponent. Subnormals are not normalised.
struct Unpacked {
  int64_t significand;
  int exponent;
};

constexpr int kFractionBits = 23;

Unpacked unpack(float value, int min_exponent) {
  int exponent;
  const float fraction = std::frexp(value, &exponent);  // 0.5 <= |fraction| < 1
  exponent = std::max(exponent - 1, min_exponent);
  if (fraction == 0) return {0, min_exponent};
  return {static_cast<int64_t>(std::ldexp(value, kFractionBits - exponent)), exponent};
}

// The one rounding of a block's sum.
float round_sum(double sum, bool half) {
  if (half) return decode<Binary16>(encode<Binary16>(sum));
  // Toward zero; from 2^128 on the exponent itself overflows, to infinity.
  if (std::fabs(sum) >= 0x1p128) return static_cast<float>(sum);
  return bit_cast<float>(encode<Binary32>(sum, Rounding::Zero));
}

// One element of D and one block of k.
class BlockSum {
 public:
  BlockSum(bool half, int fraction_bits)
      : half_(half),
        fraction_bits_(fraction_bits),
        zero_exponent_((half ? 4 : -108) - fraction_bits) {}

  float operator()(const Unpacked* a, const Unpacked* b, int b_step, int length, float c) const {
    const Unpacked start = unpack(c, min_exponent(half_ ? TensorFormat::F16 : TensorFormat::TF32));
    // A term that is zero counts with an exponent of its own, so the largest is never less than
    // that.
    int largest = zero_exponent_;
    if (start.significand != 0) largest = std::max(largest, start.exponent);
    for (int i = 0; i < length; ++i) {
      if (a[i].significand != 0 && b[i * b_step].significand != 0) {
        largest = std::max(largest, a[i].exponent + b[i * b_step].exponent);
      }
    }
    int64_t sum = align(start.significand * (int64_t{1} << kFractionBits), start.exponent, largest);
    for (int i = 0; i < length; ++i) {
      const Unpacked& right = b[i * b_step];
      sum += align(a[i].significand * right.significand, a[i].exponent + right.exponent, largest);
    }
    const double exact = std::ldexp(static_cast<double>(sum), largest - fraction_bits_);
    return round_sum(exact, half_) + 0.0f;  // never −0
  }

 private:
  // A product has twice the fraction bits of its factors; what falls below the last bit kept is cut
  // off.
  int64_t align(int64_t product, int exponent, int largest) const {
    const int shift = std::min(2 * kFractionBits - fraction_bits_ + largest - exponent, 62);
    return product < 0 ? -(-product >> shift) : product >> shift;
  }

  bool half_;
  int fraction_bits_;
  int zero_exponent_;
};

std::vector<Unpacked> unpack_all(const float* values, int count, TensorFormat format,
                                 bool* finite) {
  std::vector<Unpacked> result(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    if (std::isfinite(values[i])) {
      result[static_cast<size_t>(i)] = unpack(values[i], min_exponent(format));
    } else {
      *finite = false;
    }
  }
  return result;
}

// Infinities and NaNs follow IEEE 754; in fp64 no finite product overflows. False: all terms are
// finite.
bool sum_special(const float* a, const float* b, int b_step, int length, float c, bool half,
                 float* d) {
  double sum = c;
  for (int i = 0; i < length; ++i) sum += static_cast<double>(a[i]) * b[i * b_step];
  if (std::isfinite(sum)) return false;
  // The canonical NaN: 0x7fffffff, or 0x7fff in fp16.
  *d = std::isnan(sum) ? bit_cast<float>(half ? 0x7fffe000 : Binary32::kNaN)
                       : static_cast<float>(sum);
  return true;
}

void multiply_truncating(TensorFormat format, bool half, const Summation& summation, const float* a,
                         const float* b, float* d, int n, int k) {
  bool finite = true;
  const std::vector<Unpacked> left = unpack_all(a, kTileRows * k, format, &finite);
  const std::vector<Unpacked> right = unpack_all(b, k * n, format, &finite);
  const int length = std::min(k, summation.block_bytes / bytes_of(format));
  const BlockSum block_sum(half, summation.fraction_bits);
  for (int row = 0; row < kTileRows; ++row) {
    for (int column = 0; column < n; ++column) {
      float& sum = d[row * n + column];
      for (int i = 0; i < k; i += length) {
        const int l = row * k + i, r = i * n + column;
        if ((!finite || !std::isfinite(sum)) &&
            sum_special(a + l, b + r, n, length, sum, half, &sum)) {
          continue;
        }
        sum = block_sum(&left[static_cast<size_t>(l)], &right[static_cast<size_t>(r)], n, length,
                        sum);
      }
    }
  }
}

}  // namespace

void multiply(TensorFormat format, bool half, const Summation& summation, const float* a,
              const float* b, float* d, int n, int k) {
  if (summation.fraction_bits != 0) {
    multiply_truncating(format, half, summation, a, b, d, n, k);
    return;
  }
  multiply_plain(a, b, d, n, k);
  if (half) {
    for (int i = 0; i < kTileRows * n; ++i) d[i] = decode<Binary16>(encode<Binary16>(d[i]));
  }
}

}  // namespace emulator
