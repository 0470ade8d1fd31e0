// Products of the long operand (X: 16-bit, or fp32) with a thin one, one step of depth: 16 rows of
// 16-bit elements, 8 of fp32.
//
// kHalf         both are 16-bit: one mma.
// kHalfMasters  the thin operand v is fp32. X is exact in tf32, and v = high + low of tf32 with an
//               error of at most 2^-21 |v|: two mma of eight rows each. A register of X's holds
//               rows 2t and 2t+1; unpacked, they are rows t and t+4 of tf32's fragment, in which
//               the order of the depth is free as long as the thin operand's follows (DepthTile's
//               kInterleaved).
// kTf32         both are fp32 and rounded.
#pragma once

#include "kernels/element.h"
#include "kernels/lora_linear.h"
#include "kernels/ptx/mma.cuh"

namespace fused_lora::kernels::rank_grad {

// Steps of the thin operand's tile in one of X's.
template <Arithmetic kArithmetic>
constexpr int kThinSteps = kArithmetic == Arithmetic::kHalfMasters ? 2 : 1;

// cvt.rna.tf32 is three instructions of the machine, because it looks after infinities, and a warp
// splits as many numbers as it issues products. So high is v cut off, one instruction, which keeps
// infinities and NaNs; low is the exact rest, rounded to nearest by an integer addition, which
// turns the rest of those, a NaN, into a zero: the sum is theirs all the same.
struct Tf32Pair {
  uint32_t high, low;

  __device__ explicit Tf32Pair(uint32_t bits) {
    constexpr uint32_t kKept = 0xffffe000u, kHalfUnit = 0x1000u;
    high = bits & kKept;
    const float rest = __uint_as_float(bits) - __uint_as_float(high);
    low = (__float_as_uint(rest) + kHalfUnit) & kKept;
  }
};

__device__ __forceinline__ uint32_t rounded(uint32_t bits) {
  return ptx::round_to_tf32(__uint_as_float(bits));
}

// d += X · thin: X's fragments on the left.
template <typename T, Arithmetic kArithmetic, int kLeft, int kRight>
__device__ __forceinline__ void multiply_long_left(
    float (&d)[kLeft][kRight][4], const uint32_t (&x)[kLeft][4],
    const uint32_t (&thin)[kThinSteps<kArithmetic>][kRight][2]) {
  if constexpr (kArithmetic == Arithmetic::kHalf) {
#pragma unroll
    for (int j = 0; j < kRight; ++j) {
#pragma unroll
      for (int i = 0; i < kLeft; ++i) {
        ptx::mma_16x8x16<T>(d[i][j], x[i], thin[0][j][0], thin[0][j][1]);
      }
    }
  } else {
#pragma unroll
    for (int s = 0; s < kThinSteps<kArithmetic>; ++s) {
      uint32_t a[kLeft][4];
#pragma unroll
      for (int i = 0; i < kLeft; ++i) {
        if constexpr (kArithmetic == Arithmetic::kHalfMasters) {
          const float2 row = unpack_pair<T>(x[i][2 * s]), row8 = unpack_pair<T>(x[i][2 * s + 1]);
          a[i][0] = __float_as_uint(row.x), a[i][1] = __float_as_uint(row8.x);
          a[i][2] = __float_as_uint(row.y), a[i][3] = __float_as_uint(row8.y);
        } else {
#pragma unroll
          for (int r = 0; r < 4; ++r) a[i][r] = rounded(x[i][r]);
        }
      }
#pragma unroll
      for (int j = 0; j < kRight; ++j) {
        const uint32_t b0 = thin[s][j][0], b1 = thin[s][j][1];
        if constexpr (kArithmetic == Arithmetic::kHalfMasters) {
          const Tf32Pair p0(b0), p1(b1);
#pragma unroll
          for (int i = 0; i < kLeft; ++i) {
            ptx::mma_16x8x8_tf32(d[i][j], a[i], p0.high, p1.high);
            ptx::mma_16x8x8_tf32(d[i][j], a[i], p0.low, p1.low);
          }
        } else {
          const uint32_t r0 = rounded(b0), r1 = rounded(b1);
#pragma unroll
          for (int i = 0; i < kLeft; ++i) ptx::mma_16x8x8_tf32(d[i][j], a[i], r0, r1);
        }
      }
    }
  }
}

// d += thin · X: X's fragment on the right, eight columns of it.
template <typename T, Arithmetic kArithmetic, int kLeft>
__device__ __forceinline__ void multiply_long_right(
    float (&d)[kLeft][4], const uint32_t (&thin)[kThinSteps<kArithmetic>][kLeft][4],
    const uint32_t (&x)[2]) {
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    if constexpr (kArithmetic == Arithmetic::kHalf) {
      ptx::mma_16x8x16<T>(d[i], thin[0][i], x[0], x[1]);
    } else if constexpr (kArithmetic == Arithmetic::kHalfMasters) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float2 depths = unpack_pair<T>(x[s]);
        const uint32_t b0 = __float_as_uint(depths.x), b1 = __float_as_uint(depths.y);
        uint32_t high[4], low[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const Tf32Pair pair(thin[s][i][r]);
          high[r] = pair.high, low[r] = pair.low;
        }
        ptx::mma_16x8x8_tf32(d[i], high, b0, b1);
        ptx::mma_16x8x8_tf32(d[i], low, b0, b1);
      }
    } else {
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = rounded(thin[0][i][r]);
      ptx::mma_16x8x8_tf32(d[i], a, rounded(x[0]), rounded(x[1]));
    }
  }
}

}  // namespace fused_lora::kernels::rank_grad
