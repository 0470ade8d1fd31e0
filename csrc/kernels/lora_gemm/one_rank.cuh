// The low-rank product without matrix units, rank by rank, for the rows that use it alone. In a
// tile that rows of several adapters share, a row's zeros meet the others' part of the right
// operand: where that is infinite or not a number, so is the product, and this takes the matrix
// units' place.
#pragma once

#include "kernels/lora_gemm/fragments.cuh"

namespace fused_lora::kernels::lora_gemm {

// sums += left · right for the rows of a warp's part of the tile that `uses` names. left(row) and
// right(column) are one rank's numbers; rows and columns are counted from the tile's first.
template <typename Traits, typename Uses, typename Left, typename Right>
__device__ __forceinline__ void add_rank(Accumulators<Traits>& sums, const Uses& uses,
                                         const Left& left, const Right& right) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = Traits::warp_row(warp) + lane / 4;
  const int first_column = Traits::warp_column(warp) + lane % 4 * 2;
  float factor[Traits::kColumnFragments][2];
#pragma unroll
  for (int j = 0; j < Traits::kColumnFragments; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) factor[j][e] = right(first_column + 8 * j + e);
  }
#pragma unroll
  for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * i + 8 * half;
      if (!uses(row)) continue;
      const float low = left(row);
#pragma unroll
      for (int j = 0; j < Traits::kColumnFragments; ++j) {
        sums[i][j][2 * half] += low * factor[j][0];
        sums[i][j][2 * half + 1] += low * factor[j][1];
      }
    }
  }
}

}  // namespace fused_lora::kernels::lora_gemm
