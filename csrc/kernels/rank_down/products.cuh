// A warp's slice of X in registers: its dropout, and its products with the slice of F.
#pragma once

#include <cstdint>

#include "kernels/element.h"
#include "kernels/ptx/mma.cuh"
#include "kernels/rank_down/traits.cuh"
#include "kernels/tile/dropout.cuh"

namespace fused_lora::kernels {

// X's fragments of one slice: chunk[m][h] is the lane's chunk of row 16m + 8h + g.
template <typename Traits>
struct XFragments {
  uint32_t chunk[Traits::kRowFragments][2][4];

  __device__ __forceinline__ void load(const unsigned char* tile, int lane) {
#pragma unroll
    for (int m = 0; m < Traits::kRowFragments; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 loaded = reinterpret_cast<const uint4*>(tile)[(2 * m + h) * kWarpLanes + lane];
        chunk[m][h][0] = loaded.x, chunk[m][h][1] = loaded.y;
        chunk[m][h][2] = loaded.z, chunk[m][h][3] = loaded.w;
      }
    }
  }

  // row: of the lane's first chunk. column: of the slice.
  __device__ __forceinline__ void drop(const DropoutKey& key, int64_t row, int column, int lane) {
    const int t = lane % 4;
#pragma unroll
    for (int m = 0; m < Traits::kRowFragments; ++m) {
      if constexpr (sizeof(typename Traits::T) == 2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 mask = block_masks(key, row + 16 * m + 8 * h, key.block_of(column) + t);
          chunk[m][h][0] &= mask.x, chunk[m][h][1] &= mask.y;
          chunk[m][h][2] &= mask.z, chunk[m][h][3] &= mask.w;
        }
      } else {
        // A Philox call decides two chunks, those of lanes t and t ^ 1, and both lanes need it for
        // rows g and g+8: the even one draws for row g, the odd one for g+8, and they swap halves.
        const bool odd = t % 2 != 0;
        const uint4 mask =
            block_masks(key, row + 16 * m + (odd ? 8 : 0), key.block_of(column) + t / 2);
        const uint32_t other0 = __shfl_xor_sync(0xffffffffu, odd ? mask.x : mask.z, 1);
        const uint32_t other1 = __shfl_xor_sync(0xffffffffu, odd ? mask.y : mask.w, 1);
        drop_four(chunk[m][0], odd ? other0 : mask.x, odd ? other1 : mask.y);
        drop_four(chunk[m][1], odd ? mask.z : other0, odd ? mask.w : other1);
      }
    }
  }

 private:
  // Four fp32 numbers under the masks of two pairs of 16-bit ones.
  __device__ __forceinline__ static void drop_four(uint32_t (&value)[4], uint32_t pair0,
                                                   uint32_t pair1) {
    value[0] = (pair0 & 0xffffu) ? value[0] : 0;
    value[1] = (pair0 >> 16) ? value[1] : 0;
    value[2] = (pair1 & 0xffffu) ? value[2] : 0;
    value[3] = (pair1 >> 16) ? value[3] : 0;
  }
};

// sums += X's slice · F's slice, F in X's 16-bit dtype.
template <typename Traits>
__device__ __forceinline__ void multiply_pairs(Accumulators<Traits>& sums,
                                               const XFragments<Traits>& x,
                                               const unsigned char* factor, int lane) {
#pragma unroll
  for (int n = 0; n < Traits::kRankFragments; ++n) {
    uint32_t pair[4];
    Traits::Tile::load_pairs(pair, factor, n, lane);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int m = 0; m < Traits::kRowFragments; ++m) {
        const auto& c = x.chunk[m];
        const uint32_t a[4] = {c[0][2 * k], c[1][2 * k], c[0][2 * k + 1], c[1][2 * k + 1]};
        ptx::mma_16x8x16<typename Traits::T>(sums[m][n], a, pair[2 * k], pair[2 * k + 1]);
      }
    }
  }
}

// The same with F in fp32, rounded to X's 16-bit dtype.
template <typename Traits>
__device__ __forceinline__ void multiply_rounded(Accumulators<Traits>& sums,
                                                 const XFragments<Traits>& x,
                                                 const unsigned char* factor, int lane) {
  using T = typename Traits::T;
#pragma unroll
  for (int quad = 0; quad < Traits::kQuads; ++quad) {
#pragma unroll
    for (int n = 0; n < Traits::kRankFragments; ++n) {
      float value[4];
      Traits::Tile::load_quad(value, factor, n, quad, lane);
      const uint32_t b0 = pack_pair<T>(value[0], value[1]);
      const uint32_t b1 = pack_pair<T>(value[2], value[3]);
#pragma unroll
      for (int m = 0; m < Traits::kRowFragments; ++m) {
        const auto& c = x.chunk[m];
        const uint32_t a[4] = {c[0][2 * quad], c[1][2 * quad], c[0][2 * quad + 1],
                               c[1][2 * quad + 1]};
        ptx::mma_16x8x16<T>(sums[m][n], a, b0, b1);
      }
    }
  }
}

// Numbers 2·step and 2·step+1 of a chunk of X in tf32.
template <typename T>
__device__ __forceinline__ void tf32_pair(uint32_t (&pair)[2], const uint32_t (&chunk)[4],
                                          int step) {
  if constexpr (sizeof(T) == 2) {
    const float2 unpacked = unpack_pair<T>(chunk[step]);
    pair[0] = __float_as_uint(unpacked.x), pair[1] = __float_as_uint(unpacked.y);
  } else {
    pair[0] = ptx::round_to_tf32(__uint_as_float(chunk[2 * step]));
    pair[1] = ptx::round_to_tf32(__uint_as_float(chunk[2 * step + 1]));
  }
}

// In tf32: one product of rounded numbers, or two where F is in pieces. A lane's two numbers of a
// step are mma's k = t and t + 4 on both sides.
template <typename Traits>
__device__ __forceinline__ void multiply_tf32(Accumulators<Traits>& sums,
                                              const XFragments<Traits>& x,
                                              const unsigned char* factor, int lane) {
  constexpr bool kPieces = Traits::kArithmetic == Arithmetic::kHalfMasters;
#pragma unroll
  for (int quad = 0; quad < Traits::kQuads; ++quad) {
    uint32_t a[2][Traits::kRowFragments][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int m = 0; m < Traits::kRowFragments; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t pair[2];
          tf32_pair<typename Traits::T>(pair, x.chunk[m][h], 2 * quad + step);
          a[step][m][h] = pair[0], a[step][m][2 + h] = pair[1];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < Traits::kRankFragments; ++n) {
      float value[4];
      Traits::Tile::load_quad(value, factor, n, quad, lane);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const float v0 = value[2 * step], v1 = value[2 * step + 1];
        const uint32_t high0 = ptx::round_to_tf32(v0), high1 = ptx::round_to_tf32(v1);
#pragma unroll
        for (int m = 0; m < Traits::kRowFragments; ++m) {
          ptx::mma_16x8x8_tf32(sums[m][n], a[step][m], high0, high1);
        }
        if constexpr (kPieces) {
          const uint32_t low0 = ptx::round_to_tf32(v0 - __uint_as_float(high0));
          const uint32_t low1 = ptx::round_to_tf32(v1 - __uint_as_float(high1));
#pragma unroll
          for (int m = 0; m < Traits::kRowFragments; ++m) {
            ptx::mma_16x8x8_tf32(sums[m][n], a[step][m], low0, low1);
          }
        }
      }
    }
  }
}

}  // namespace fused_lora::kernels
