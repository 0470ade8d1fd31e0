// From stages to a launch of rank_grad.cuh's kernel.
#pragma once

#include <algorithm>

#include "kernels/alignment.h"
#include "kernels/rank_grad/rank_grad.cuh"

namespace fused_lora::kernels::rank_grad {

template <typename Traits>
GradParams grad_params(const RankGrad& stage) {
  using T = typename Traits::T;
  GradParams p{};
  p.x = stage.x.data;
  p.x_pitch = stage.x.row_stride * static_cast<int64_t>(sizeof(T));
  p.low = thin_of(stage, sizeof(typename Traits::Low));
  p.rows = stage.rows;
  p.columns = stage.columns;
  p.alpha = stage.alpha;
  p.row_adapters = stage.row_adapters;
  p.dropout = stage.dropout;
  p.transposed = stage.transposed;
  p.splits = stage.splits;
  p.row_tiles = ceil_div(stage.rows, Traits::kRows);
  p.tiles_per_split = ceil_div(p.row_tiles, stage.splits);
  p.column_tiles = static_cast<int>(ceil_div(stage.columns, Traits::kColumns));
  p.out = stage.splits > 1 ? stage.partials : stage.out;
  p.out_dtype = stage.out_dtype;
  return p;
}

// Whether two stages read one X in the same shares.
inline bool share_x(const RankGrad& a, const RankGrad& b) {
  return a.x.data == b.x.data && a.x.row_stride == b.x.row_stride && a.rows == b.rows &&
         a.columns == b.columns && a.splits == b.splits;
}

template <typename Traits>
cudaError_t launch_traits(const RankGrad* stages, int count, cudaStream_t stream) {
  LaunchParams params{};
  params.count = count;
  int64_t blocks = 0;
  for (int begin = 0, end = 0; begin < count; begin = end) {
    int tiles = 0;
    for (; end < count && share_x(stages[begin], stages[end]); ++end) {
      params.stages[end] = grad_params<Traits>(stages[end]);
      params.members[end] = {static_cast<int>(blocks), 0, tiles};
      tiles += static_cast<int>(ceil_div(stages[end].rank, Traits::kRanks));
    }
    for (int i = begin; i < end; ++i) params.members[i].set_tiles = tiles;
    const GradParams& first = params.stages[begin];
    blocks += static_cast<int64_t>(first.splits) * first.column_tiles * tiles;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  }
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<Traits><<<static_cast<unsigned>(blocks), kThreads, Traits::kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, Arithmetic kArithmetic>
cudaError_t launch_ranks(const RankGrad* stages, int count, cudaStream_t stream) {
  int64_t rank = stages[0].rank;
  for (int i = 1; i < count; ++i) rank = std::max(rank, stages[i].rank);
  switch (rank_tile(rank)) {
    case 16:
      return launch_traits<GradTraits<T, kArithmetic, 16>>(stages, count, stream);
    case 32:
      return launch_traits<GradTraits<T, kArithmetic, 32>>(stages, count, stream);
    default:
      return launch_traits<GradTraits<T, kArithmetic, 64>>(stages, count, stream);
  }
}

// T: bf16 or fp16.
template <typename T>
cudaError_t launch_half(const RankGrad* stages, int count, cudaStream_t stream) {
  return stages[0].arithmetic == Arithmetic::kHalf
             ? launch_ranks<T, Arithmetic::kHalf>(stages, count, stream)
             : launch_ranks<T, Arithmetic::kHalfMasters>(stages, count, stream);
}

}  // namespace fused_lora::kernels::rank_grad
