// Sums on their way from accumulators to global memory: a tile of fp32 in shared memory, written in
// fragments and read in rows.
#pragma once

#include "kernels/element.h"
#include "kernels/ptx/global_memory.cuh"
#include "kernels/rank_grad/depth_tile.cuh"

namespace fused_lora::kernels::rank_grad {

// rows × kRanks, the ranks contiguous.
template <int kRanks>
using StagedByRow = DepthTile<float, kRanks>;

// kRanks rows of kColumns: the transpose. Pairs of chunks are permuted by both of the ways in which
// a quad's four ranks may differ: by 2 (16-bit fragments), by 4 and by 8 (fp32's).
template <int kColumns>
struct StagedByRank {
  static_assert(kColumns % 32 == 0, "every row begins at the first bank");
  __device__ static constexpr int element_offset(int rank, int column) {
    const int permutation = ((rank >> 1) ^ (rank >> 3)) & 3;
    return rank * kColumns * 4 + ((column / 4) ^ (2 * permutation)) * kChunkBytes + column % 4 * 4;
  }
};

__device__ __forceinline__ uint4 as_bits(float a, float b, float c, float d) {
  return {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)};
}

// One row of a lane's part of a fragment row: columns 2·(lane%4) + e of kRight fragments, in the
// order of RightFragments::column. half: 0 for the accumulators' rows lane/4, 1 for lane/4 + 8.
template <typename ThinTile, int kRight>
__device__ __forceinline__ void stage_row(uint32_t staged, int row, int half,
                                          const float (&sums)[kRight][4], float alpha) {
  using Staged = StagedByRow<8 * kRight>;
  const auto value = [&](int j, int e) { return alpha * sums[j][2 * half + e]; };
  const int t = threadIdx.x % 4;
  if constexpr (!ThinTile::kWide) {
#pragma unroll
    for (int j = 0; j < kRight; ++j) {
      ptx::store_shared_64(staged + Staged::element_offset(row, 8 * j + 2 * t),
                           __float_as_uint(value(j, 0)), __float_as_uint(value(j, 1)));
    }
  } else if constexpr (kRight == 2) {
    ptx::store_shared_128(staged + Staged::element_offset(row, 4 * t),
                          as_bits(value(0, 0), value(1, 0), value(0, 1), value(1, 1)));
  } else {
#pragma unroll
    for (int j = 0; j < kRight; j += 4) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        ptx::store_shared_128(
            staged + Staged::element_offset(row, 8 * j + 8 * t + 4 * e),
            as_bits(value(j, e), value(j + 1, e), value(j + 2, e), value(j + 3, e)));
      }
    }
  }
}

template <typename Out>
__device__ __forceinline__ void store_four(Out* to, const uint4& bits) {
  if constexpr (sizeof(Out) == 4) {
    ptx::store_global_128(to, bits);
  } else {
    ptx::store_global_64(to, pack_pair<Out>(__uint_as_float(bits.x), __uint_as_float(bits.y)),
                         pack_pair<Out>(__uint_as_float(bits.z), __uint_as_float(bits.w)));
  }
}

// outer rows of `inner` staged numbers to `to`, whose rows are `pitch` elements apart; neighbours
// in a row by neighbouring threads, four each where `to`'s rows allow it.
template <typename Staged, int kThreads, typename Out>
__device__ __forceinline__ void store_staged(uint32_t staged, int outer, int inner, Out* to,
                                             int64_t pitch) {
  const bool by_four =
      pitch % 4 == 0 && inner % 4 == 0 && reinterpret_cast<uintptr_t>(to) % (4 * sizeof(Out)) == 0;
  if (by_four) {
    const int fours = inner / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < outer * fours; i += kThreads) {
      const int row = i / fours, column = i % fours * 4;
      store_four(to + row * pitch + column,
                 ptx::load_shared_128(staged + Staged::element_offset(row, column)));
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < outer * inner; i += kThreads) {
      const int row = i / inner, column = i % inner;
      const uint32_t bits = ptx::load_shared_32(staged + Staged::element_offset(row, column));
      to[row * pitch + column] = from_float<Out>(__uint_as_float(bits));
    }
  }
}

}  // namespace fused_lora::kernels::rank_grad
