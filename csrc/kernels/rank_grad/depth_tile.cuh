// Tiles in shared memory whose rows are the depth of a product: X's, m × columns, and the thin
// operands', m × rank or columns × rank. Their fragments need a column's neighbours in depth in one
// lane, so they are transposed on the way: 16-bit elements by ldmatrix, fp32 by ordinary loads of
// two or four neighbours.
//
// Which column of a tile a fragment's row or column stands for is free, as long as the result is
// written accordingly. For fp32 lane group g takes columns 2g, 2g+1 or 4g .. 4g+3 in one load, and
// they are the group's row (or column) in two or four fragments.
#pragma once

#include <type_traits>

#include "kernels/ptx/ldmatrix.cuh"
#include "kernels/ptx/shared_memory.cuh"
#include "kernels/tile/swizzle.cuh"

namespace fused_lora::kernels::rank_grad {

// kInterleaved: of each eight rows of depth, the even ones lie first, then the odd ones. Beside
// 16-bit elements that are unpacked for tf32, lane t of a quad holds depths 2t and 2t+1 where
// tf32's fragments want t and t+4 (products.cuh); interleaved, 2t and 2t+1 lie at t and t+4.
template <typename Element_, int kColumns_, bool kInterleaved = false>
struct DepthTile {
  using Element = Element_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kElementBytes = sizeof(Element);
  static constexpr bool kWide = kElementBytes == 4;
  static constexpr int kRowBytes = kColumns * kElementBytes;
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kStepRows = kWide ? 8 : 16;  // the mma's depth
  static_assert(!kInterleaved || kWide, "16-bit elements meet 16-bit elements in their own order");

  // The row of depth that is stored at a place, and the place of a row.
  __device__ static constexpr int depth_at(int place) {
    return kInterleaved ? (place & ~7) | ((place & 3) << 1) | ((place >> 2) & 1) : place;
  }

  // Byte offset of a chunk. A place's swizzle repeats every eight places. For fp32 each of these
  // must touch all banks once:
  //
  //     four places × two neighbouring chunks         loads of fragments, staging of pairs
  //     eight places × one chunk                      ldmatrix
  //     two places, one, two or four apart,           staging of four columns
  //         × four chunks, every one or every other
  __device__ static constexpr int offset(int place, int chunk) {
    if constexpr (!kWide) {
      return swizzled<kRowBytes>(place, chunk);
    } else if constexpr (kChunks == 4) {
      // Two places fill the banks; both low bits of a place decide which half of them it takes.
      return (place ^ ((place >> 1) & 1)) * kRowBytes + (chunk ^ (place & 2)) * kChunkBytes;
    } else {
      static_assert(kRowBytes % 128 == 0, "every row begins at the first bank");
      const int permutation = ((place & 3) << 1) | ((place ^ (place >> 2)) & 1);
      return place * kRowBytes + (chunk ^ permutation) * kChunkBytes;
    }
  }
  __device__ static constexpr int element_offset(int place, int column) {
    constexpr int kPerChunk = kChunkBytes / kElementBytes;
    return offset(place, column / kPerChunk) + column % kPerChunk * kElementBytes;
  }
};

// The left operand's fragments (16 rows × depth) of 16·kFragments columns of a tile.
template <typename Tile, int kFragments>
struct LeftFragments {
  static constexpr bool kPairs = kFragments == 1;  // fp32: a load of two columns feeds one fragment
  static_assert(kPairs || kFragments % 2 == 0, "fp32: a load of four columns feeds two fragments");
  static constexpr int kLoads = Tile::kWide && !kPairs ? kFragments / 2 : kFragments;
  uint32_t at[kLoads];

  __device__ explicit LeftFragments(int first_column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if constexpr (Tile::kWide) {
        const int column = first_column + (kPairs ? 2 : 4) * (lane / 4) + 32 * i;
        at[i] = Tile::element_offset(lane % 4, column);
      } else {
        // Matrices 0 and 1: depths 0 to 7 of columns 0 to 7 and 8 to 15; 2 and 3: depths 8 to 15.
        at[i] = Tile::offset(lane / 16 * 8 + lane % 8, first_column / 8 + 2 * i + lane / 8 % 2);
      }
    }
  }

  __device__ void load(uint32_t (&a)[kFragments][4], uint32_t tile, int step) const {
    tile += step * Tile::kStepRows * Tile::kRowBytes;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if constexpr (!Tile::kWide) {
        ptx::ldmatrix_x4_transposed(a[i], tile + at[i]);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t from = tile + half * 4 * Tile::kRowBytes;
          // Four places further the swizzle differs in one bit, so the offset is made anew.
          if constexpr (kPairs) {
            const uint2 v = ptx::load_shared_64(from + swizzle_of(i, half));
            a[0][2 * half] = v.x, a[0][2 * half + 1] = v.y;
          } else {
            const uint4 v = ptx::load_shared_128(from + swizzle_of(i, half));
            a[2 * i][2 * half] = v.x, a[2 * i][2 * half + 1] = v.y;
            a[2 * i + 1][2 * half] = v.z, a[2 * i + 1][2 * half + 1] = v.w;
          }
        }
      }
    }
  }

  // The column, from the first, that this lane's row lane/4 (half 0) or lane/4 + 8 (half 1) stands
  // for.
  __device__ static int column(int i, int half) {
    const int group = threadIdx.x % 32 / 4;
    if constexpr (!Tile::kWide) return 16 * i + 8 * half + group;
    if constexpr (kPairs) return 2 * group + half;
    return i / 2 * 32 + 4 * group + i % 2 * 2 + half;
  }

 private:
  __device__ uint32_t swizzle_of(int i, int half) const {
    return half == 0 || Tile::kChunks == 4 ? at[i] : at[i] ^ kChunkBytes;
  }
};

// The right operand's fragments (depth × 8 columns) of 8·kFragments columns of a tile, from its
// first.
template <typename Tile, int kFragments>
struct RightFragments {
  static constexpr bool kPairs = kFragments == 2;
  static_assert(kPairs || kFragments % 4 == 0, "a load feeds two or four fragments");
  static constexpr int kLoads = Tile::kWide && !kPairs ? kFragments / 4 : kFragments / 2;
  uint32_t at[kLoads];

  __device__ RightFragments() {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if constexpr (Tile::kWide) {
        at[i] = Tile::element_offset(lane % 4, (kPairs ? 2 : 4) * (lane / 4) + 32 * i);
      } else {
        // Matrices 0 and 1: depths 0 to 7 and 8 to 15 of columns 0 to 7; 2 and 3: of columns 8
        // to 15.
        at[i] = Tile::offset(lane % 16, 2 * i + lane / 16);
      }
    }
  }

  __device__ void load(uint32_t (&b)[kFragments][2], uint32_t tile, int step) const {
    tile += step * Tile::kStepRows * Tile::kRowBytes;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if constexpr (!Tile::kWide) {
        uint32_t r[4];
        ptx::ldmatrix_x4_transposed(r, tile + at[i]);
        b[2 * i][0] = r[0], b[2 * i][1] = r[1];
        b[2 * i + 1][0] = r[2], b[2 * i + 1][1] = r[3];
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t from = tile + half * 4 * Tile::kRowBytes;
          if constexpr (kPairs) {
            const uint2 v = ptx::load_shared_64(from + swizzle_of(i, half));
            b[0][half] = v.x, b[1][half] = v.y;
          } else {
            const uint4 v = ptx::load_shared_128(from + swizzle_of(i, half));
            b[4 * i][half] = v.x, b[4 * i + 1][half] = v.y;
            b[4 * i + 2][half] = v.z, b[4 * i + 3][half] = v.w;
          }
        }
      }
    }
  }

  // The column of the tile that column 2·(lane%4) + e of fragment j stands for.
  __device__ static int column(int j, int e) {
    const int in_fragment = threadIdx.x % 4 * 2 + e;
    if constexpr (!Tile::kWide) return 8 * j + in_fragment;
    if constexpr (kPairs) return 2 * in_fragment + j;
    return j / 4 * 32 + 4 * in_fragment + j % 4;
  }

 private:
  __device__ uint32_t swizzle_of(int i, int half) const {
    return half == 0 || Tile::kChunks == 4 ? at[i] : at[i] ^ kChunkBytes;
  }
};

}  // namespace fused_lora::kernels::rank_grad
