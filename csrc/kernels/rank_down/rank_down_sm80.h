// What rank_down.cpp decides on the host, and the launchers that it hands the decisions to: one for
// each element type of X, in a file of its own.
#pragma once

#include <array>

#include "kernels/stages.h"

namespace fused_lora::kernels {

// A block's share of out: rows of X times ranks of F.
struct RankDownTile {
  int rows = 0;
  int ranks = 0;
};

// Of the kernel's tiles, the one that lets the slowest multiprocessor finish first.
RankDownTile choose_rank_down_tile(const RankDown* stages, int count, int multiprocessors);

// How F comes from global memory. The 16-byte copies need F's contiguous dimension to be whole
// chunks, at addresses that are multiples of 16; element by element anything goes.
enum class FactorSource {
  kDepthChunks,  // contiguous along X's columns: Aᵀ
  kRankChunks,   // contiguous along the rank: B
  kElements,
};

FactorSource rank_down_factor_source(const RankDown& stage);

// Stages of one X, by one tile. Their sources are all kRankChunks, or none is.
struct RankDownLaunch {
  const RankDown* stages = nullptr;
  int count = 0;
  RankDownTile tile;
  std::array<FactorSource, kMostCalls> sources = {};
};
RankDownLaunch rank_down_launch(const RankDown* stages, int count, RankDownTile tile);

cudaError_t launch_rank_down_bf16_sm80(const RankDownLaunch& launch, cudaStream_t stream);
cudaError_t launch_rank_down_fp16_sm80(const RankDownLaunch& launch, cudaStream_t stream);
cudaError_t launch_rank_down_fp32_sm80(const RankDownLaunch& launch, cudaStream_t stream);

}  // namespace fused_lora::kernels
