// lora_gemm's operands from shared memory to mma fragments, and the products.
//
// Both kinds of elements share one layout in bytes: a step of the mma's depth is two chunks of 16
// bytes, 16 elements of 16 bits or 8 of fp32, and ldmatrix moves rows of 16 bytes whatever they
// hold.
#pragma once

#include <type_traits>

#include "kernels/lora_gemm/tile_copies.cuh"
#include "kernels/ptx/ldmatrix.cuh"
#include "kernels/ptx/mma.cuh"
#include "kernels/ptx/shared_memory.cuh"

namespace fused_lora::kernels::lora_gemm {

template <typename Traits>
struct Fragments {
  uint32_t a[Traits::kRowFragments][4];
  uint32_t b[Traits::kColumnFragments][2];
};

// Where a lane reads X's tile: rows lane % 16 of a fragment, chunk lane / 16 of a step. Offsets in
// bytes from the tile's first; other fragments lie a constant further, because 16 rows keep the
// swizzle.
template <typename Traits>
struct RowFragmentOffsets {
  uint32_t step[Traits::kSteps];

  __device__ explicit RowFragmentOffsets(int first_row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < Traits::kSteps; ++s) {
      step[s] = swizzled<kPackedTileBytes>(first_row + lane % 16, 2 * s + lane / 16);
    }
  }
  __device__ void load(uint32_t (&a)[Traits::kRowFragments][4], uint32_t tile, int s) const {
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
      ptx::ldmatrix_x4(a[i], tile + step[s] + i * 16 * kPackedTileBytes);
    }
  }
};

// Where a lane reads W's tile. One ldmatrix feeds two fragments of eight columns.
template <typename Traits, bool kDepthContiguous = Traits::kDepthContiguous>
struct ColumnFragmentOffsets;

// columns × depth: matrices 0 and 1 are the two chunks of columns 0 to 7, 2 and 3 of columns 8
// to 15.
template <typename Traits>
struct ColumnFragmentOffsets<Traits, true> {
  uint32_t step[Traits::kSteps];

  __device__ explicit ColumnFragmentOffsets(int first_column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < Traits::kSteps; ++s) {
      step[s] =
          swizzled<kPackedTileBytes>(first_column + lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2);
    }
  }
  __device__ void load(uint32_t (&b)[Traits::kColumnFragments][2], uint32_t tile, int s) const {
#pragma unroll
    for (int j = 0; j < Traits::kColumnFragments; j += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, tile + step[s] + j * 8 * kPackedTileBytes);
      b[j][0] = r[0], b[j][1] = r[1];
      b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
  }
};

// depth × columns: matrices 0 and 1 are depths 0 to 7 and 8 to 15 of columns 0 to 7, 2 and 3 of
// columns 8 to 15, transposed on the way. fp32 cannot be transposed so: a lane loads its elements
// one by one.
template <typename Traits>
struct ColumnFragmentOffsets<Traits, false> {
  static constexpr int kRowBytes = Traits::kTile.columns * Traits::kElementBytes;
  static constexpr bool kTransposes = Traits::kElementBytes == 2;
  static constexpr int kOffsets =
      kTransposes ? Traits::kColumnFragments / 2 : Traits::kColumnFragments;
  uint32_t fragment[kOffsets];

  __device__ explicit ColumnFragmentOffsets(int first_column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kOffsets; ++j) {
      if constexpr (kTransposes) {
        fragment[j] = column_tile_offset<Traits>(lane % 16, first_column / 8 + 2 * j + lane / 16);
      } else {
        const int column = first_column + 8 * j + lane / 4;
        fragment[j] = column_tile_offset<Traits>(lane % 4, column / 4) + column % 4 * 4;
      }
    }
  }
  __device__ void load(uint32_t (&b)[Traits::kColumnFragments][2], uint32_t tile, int s) const {
    if constexpr (kTransposes) {
#pragma unroll
      for (int j = 0; j < kOffsets; ++j) {
        uint32_t r[4];
        ptx::ldmatrix_x4_transposed(r, tile + fragment[j] + s * 16 * kRowBytes);
        b[2 * j][0] = r[0], b[2 * j][1] = r[1];
        b[2 * j + 1][0] = r[2], b[2 * j + 1][1] = r[3];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kOffsets; ++j) {
        const uint32_t at = tile + fragment[j] + s * 8 * kRowBytes;
        b[j][0] = ptx::load_shared_32(at);
        b[j][1] = ptx::load_shared_32(at + 4 * kRowBytes);
      }
    }
  }
};

template <typename Traits>
using Accumulators = float[Traits::kRowFragments][Traits::kColumnFragments][4];

// One step of the mma's depth. Element: of this tile's operands, Traits::T or Traits::Packed.
template <typename Element, typename Traits>
__device__ __forceinline__ void multiply(Accumulators<Traits>& sums, Fragments<Traits>& f) {
  if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) f.a[i][r] = ptx::round_to_tf32(__uint_as_float(f.a[i][r]));
    }
#pragma unroll
    for (int j = 0; j < Traits::kColumnFragments; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) f.b[j][r] = ptx::round_to_tf32(__uint_as_float(f.b[j][r]));
    }
  }
#pragma unroll
  for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kColumnFragments; ++j) {
      if constexpr (std::is_same_v<Element, float>) {
        ptx::mma_16x8x8_tf32(sums[i][j], f.a[i], f.b[j][0], f.b[j][1]);
      } else {
        ptx::mma_16x8x16<Element>(sums[i][j], f.a[i], f.b[j][0], f.b[j][1]);
      }
    }
  }
}

}  // namespace fused_lora::kernels::lora_gemm
