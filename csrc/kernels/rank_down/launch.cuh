// From a stage to a launch of rank_down_sm80.cuh's kernel.
#pragma once

#include <climits>
#include <cstdint>

#include "kernels/alignment.h"
#include "kernels/rank_down/rank_down_sm80.cuh"
#include "kernels/rank_down/rank_down_sm80.h"

namespace fused_lora::kernels {

template <typename Traits>
cudaError_t launch_rank_down_kernel(const RankDown& stage, FactorSource source,
                                    cudaStream_t stream) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0;
  };
  RankDownParams p{};
  p.x = static_cast<const unsigned char*>(stage.x.data);
  p.x_row_bytes = stage.x.row_stride * static_cast<int64_t>(sizeof(typename Traits::T));
  p.rows = stage.rows;
  p.columns = static_cast<int>(stage.columns);
  p.rank = static_cast<int>(stage.rank);
  p.packed_rank = static_cast<int>(packed_rank(stage.arithmetic, stage.rank));
  p.factor = stage.factor.data;
  p.factor_depth_stride = stage.factor.row_stride;
  p.factor_rank_stride = stage.factor.column_stride;
  p.factor_by_element = source == FactorSource::kElements;
  p.store_quads = stage.rank % 4 == 0 && aligned(stage.out) && aligned(stage.packed);
  p.alpha = stage.alpha;
  p.row_adapters = stage.row_adapters;
  p.dropout = stage.dropout;
  p.out = stage.out;
  p.packed = stage.packed;
  p.rank_tiles = static_cast<int>(ceil_div(stage.rank, Traits::kRanks));
  if (stage.out != nullptr || stage.packed != nullptr) {
    p.blocks = ceil_div(stage.rows, Traits::kRows) * p.rank_tiles;
  }
  const PackFactor& partner = stage.partner;
  if (partner.packed != nullptr) {
    p.partner = {partner.factor,
                 partner.factor_dtype,
                 partner.extent,
                 static_cast<int>(partner.rank),
                 static_cast<int>(packed_rank(stage.arithmetic, partner.rank)),
                 partner.depth_contiguous,
                 partner.stride,
                 partner.packed,
                 ceil_div(partner.extent, kPackExtent) * ceil_div(partner.rank, kPackRanks)};
  }

  const int64_t blocks = p.blocks + p.partner.blocks;
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
cudaError_t launch_rank_down_tile(const RankDown& stage, RankDownTile tile, FactorSource source,
                                  cudaStream_t stream) {
  if (tile.ranks == 64) {
    return launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 64, 64>>(
        stage, source, stream);
  }
  if (tile.ranks == 32) {
    return tile.rows == 64
               ? launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 64, 32>>(
                     stage, source, stream)
               : launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 32, 32>>(
                     stage, source, stream);
  }
  return tile.rows == 32
             ? launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 32, 16>>(
                   stage, source, stream)
             : launch_rank_down_kernel<RankDownTraits<T, kArithmetic, Factor, kLayout, 16, 16>>(
                   stage, source, stream);
}

template <typename T, Arithmetic kArithmetic, typename Factor>
cudaError_t launch_rank_down_factor(const RankDown& stage, RankDownTile tile, FactorSource source,
                                    cudaStream_t stream) {
  return source == FactorSource::kRankChunks
             ? launch_rank_down_tile<T, kArithmetic, Factor, FactorLayout::kRankContiguous>(
                   stage, tile, source, stream)
             : launch_rank_down_tile<T, kArithmetic, Factor, FactorLayout::kDepthContiguous>(
                   stage, tile, source, stream);
}

}  // namespace fused_lora::kernels
