// From a stage to a launch of rank_down_sm80.cuh's kernel.
#pragma once

#include <climits>
#include <cstdint>

#include "kernels/alignment.h"
#include "kernels/rank_down/rank_down_sm80.cuh"
#include "kernels/rank_down/rank_down_sm80.h"

namespace fused_lora::kernels {

// first_tile: of the launch's tiles of ranks.
inline RankDownMember rank_down_member(const RankDown& stage, FactorSource source, int first_tile) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0;
  };
  RankDownMember m{};
  m.rank = static_cast<int>(stage.rank);
  m.packed_rank = static_cast<int>(packed_rank(stage.arithmetic, stage.rank));
  m.factor = stage.factor.data;
  m.factor_depth_stride = stage.factor.row_stride;
  m.factor_rank_stride = stage.factor.column_stride;
  m.factor_by_element = source == FactorSource::kElements;
  m.out = stage.out;
  m.out_stride = stride_or_dense(stage.out_stride, stage.rank);
  m.packed = stage.packed;
  m.store_quads = (stage.rank | m.out_stride) % 4 == 0 && aligned(m.out) && aligned(m.packed);
  m.alpha = stage.alpha;
  m.row_adapters = stage.row_adapters;
  m.dropout = stage.dropout;
  m.first_tile = first_tile;
  const PackFactor& partner = stage.partner;
  if (partner.packed != nullptr) {
    m.partner = {partner.factor,
                 partner.factor_dtype,
                 partner.extent,
                 static_cast<int>(partner.rank),
                 static_cast<int>(packed_rank(stage.arithmetic, partner.rank)),
                 partner.depth_contiguous,
                 partner.stride,
                 partner.packed,
                 ceil_div(partner.extent, kPackExtent) * ceil_div(partner.rank, kPackRanks)};
  }
  return m;
}

template <typename Traits>
cudaError_t launch_rank_down_kernel(const RankDownLaunch& launch, cudaStream_t stream) {
  const RankDown& first = launch.stages[0];
  RankDownParams p{};
  p.x = static_cast<const unsigned char*>(first.x.data);
  p.x_row_bytes = first.x.row_stride * static_cast<int64_t>(sizeof(typename Traits::T));
  p.rows = first.rows;
  p.columns = static_cast<int>(first.columns);
  p.count = launch.count;
  int64_t partners = 0;
  for (int i = 0; i < launch.count; ++i) {
    const RankDown& stage = launch.stages[i];
    p.members[i] = rank_down_member(stage, launch.sources[i], p.rank_tiles);
    partners += p.members[i].partner.blocks;
    if (stage.out != nullptr || stage.packed != nullptr) {
      p.rank_tiles += static_cast<int>(ceil_div(stage.rank, Traits::kRanks));
    }
  }
  p.blocks = ceil_div(first.rows, Traits::kRows) * p.rank_tiles;
  const int64_t blocks = p.blocks + partners;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = rank_down_kernel<Traits>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, Traits::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, Arithmetic kArithmetic, typename Factor, FactorLayout kLayout>
cudaError_t launch_rank_down_tile(const RankDownLaunch& launch, cudaStream_t stream) {
  const RankDownTile& tile = launch.tile;
  if (tile.ranks == 64) {
    return launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 64, 64>>(launch,
                                                                                            stream);
  }
  if (tile.ranks == 32) {
    return tile.rows == 64
               ? launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 64, 32>>(
                     launch, stream)
               : launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 32, 32>>(
                     launch, stream);
  }
  return tile.rows == 32
             ? launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 32, 16>>(
                   launch, stream)
             : launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 16, 16>>(
                   launch, stream);
}

template <typename T, Arithmetic kArithmetic, typename Factor>
cudaError_t launch_rank_down_factor(const RankDownLaunch& launch, cudaStream_t stream) {
  return launch.sources[0] == FactorSource::kRankChunks
             ? launch_rank_down_tile<T, kArithmetic, Factor, FactorLayout::kRankContiguous>(launch,
                                                                                            stream)
             : launch_rank_down_tile<T, kArithmetic, Factor, FactorLayout::kDepthContiguous>(
                   launch, stream);
}

}  // namespace fused_lora::kernels
