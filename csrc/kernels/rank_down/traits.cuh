// What a rank-down kernel is made for: its types, its tile and the sizes that follow. The reasons
// are in rank_down_sm80.cuh.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/rank_down/factor_tile.cuh"
#include "kernels/tile/pack.cuh"

namespace fused_lora::kernels {

// One factor, and what its product with X becomes.
struct RankDownMember {
  int rank, packed_rank;
  const void* factor;
  int64_t factor_depth_stride, factor_rank_stride;
  bool factor_by_element;
  bool store_quads;  // four ranks at a time: out's and packed's rows hold whole quads
  float alpha;
  const RowAdapter* row_adapters;  // or null
  Dropout dropout;
  void* out;
  int64_t out_stride;
  void* packed;
  int first_tile;  // of the launch's tiles of ranks
  PackFactorParams partner;
};

struct RankDownParams {
  const unsigned char* x;
  int64_t x_row_bytes;
  int64_t rows;
  int columns;
  int rank_tiles;  // of all members
  int64_t blocks;  // of the products; the partners' follow
  int count;
  RankDownMember members[kMostCalls];
};

template <typename T_, Arithmetic kArithmetic_, typename Factor_, FactorLayout kLayout_, int kRows_,
          int kRanks_>
struct RankDownTraits {
  using T = T_;
  using Factor = Factor_;
  static constexpr Arithmetic kArithmetic = kArithmetic_;
  static constexpr FactorLayout kLayout = kLayout_;
  static constexpr int kRows = kRows_, kRanks = kRanks_;
  static constexpr bool kHalf = kArithmetic == Arithmetic::kHalf;
  static_assert(kRows % 16 == 0 && kRanks % 16 == 0,
                "whole fragments, two of F's for a chunk of ranks");
  static_assert(kArithmetic != Arithmetic::kFloat32, "fp32 arithmetic has no matrix units");
  static_assert((kArithmetic == Arithmetic::kTf32) == (sizeof(T) == 4), "tf32 is fp32's");
  static_assert(kHalf || sizeof(Factor) == 4, "tf32 pieces are made of fp32 numbers");

  using Out = std::conditional_t<kHalf, T, float>;
  using Packed = PackedElement<T, kArithmetic>;

  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpLanes;
  // Registers for two blocks, and no fewer: left alone, the compiler spills to fit a third.
  static constexpr int kBlocks = 2;
  static constexpr int kRowFragments = kRows / 16, kRankFragments = kRanks / 8;

  static constexpr int kSliceBytes = 4 * kChunkBytes;
  static constexpr int kSliceDepth = kSliceBytes / static_cast<int>(sizeof(T));
  static constexpr int kLaneDepth = kSliceDepth / 4;
  static constexpr int kQuads = kLaneDepth / 4;  // of a lane's k
  using Tile = FactorTile<Factor, kLayout, kRanks, kSliceDepth>;
  static_assert(Tile::kLaneDepth == kLaneDepth, "both operands give a lane the same k");

  static constexpr int kXBytes = kRows * kSliceBytes;
  static constexpr int kStageBytes = kXBytes + Tile::kBytes;  // of one warp
  static constexpr int kTwoBlocksBytes = 48 * 1024, kOneBlockBytes = 96 * 1024;
  static constexpr int kFitTwoBlocks = kTwoBlocksBytes / (kWarps * kStageBytes);
  static constexpr int kFitOneBlock = kOneBlockBytes / (kWarps * kStageBytes);
  static constexpr int kStages = std::max(kFitTwoBlocks, std::min(kFitOneBlock, 3));
  static_assert(kStages >= 2, "one stage is read while the next is under way");
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kWarps * kWarpBytes;
  static_assert(kRows * kRanks * 4 <= kWarpBytes, "a warp's sums fit its stages");
  static_assert(kPackBytes <= kSharedBytes, "the partner's tile fits as well");
};

// A warp's sums: [m][n] is mma's D of rows 16m .. and ranks 8n ..
template <typename Traits>
using Accumulators = float[Traits::kRowFragments][Traits::kRankFragments][4];

}  // namespace fused_lora::kernels
