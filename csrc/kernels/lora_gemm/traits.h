// A lora_gemm kernel's template parameters and what follows from them.
#pragma once

#include "kernels/lora_gemm/tile_table.h"

namespace fused_lora::kernels::lora_gemm {

// T: the element of x, W and out. Packed: of the low-rank operands; as wide as T.
template <typename T_, typename Packed_, bool kDepthContiguous_, const Tile& kTile_>
struct Traits {
  using T = T_;
  using Packed = Packed_;
  static_assert(sizeof(T) == sizeof(Packed), "both kinds of tiles share one layout");
  static constexpr bool kDepthContiguous = kDepthContiguous_;  // W's, of the N×K storage
  static constexpr Tile kTile = kTile_;
  static constexpr int kWarps = kTile.warps();
  static constexpr int kThreads = kTile.threads();
  static constexpr int kStageBytes = kTile.stage_bytes();
  static constexpr int kSharedBytes = kTile.shared_bytes();
  static constexpr int kElementBytes = sizeof(T);
  static constexpr int kDepth = kPackedTileBytes / kElementBytes;
  static constexpr int kSteps = 2;  // of the mma's depth in a tile
  static constexpr int kRowFragments = kTile.warp_rows / 16;
  static constexpr int kColumnFragments = kTile.warp_columns / 8;
  static_assert(kColumnFragments % 2 == 0, "one ldmatrix feeds two column fragments");

  // A warp's first row and column of the tile.
  FUSED_LORA_HOST_DEVICE static constexpr int warp_row(int warp) {
    return warp / (kTile.columns / kTile.warp_columns) * kTile.warp_rows;
  }
  FUSED_LORA_HOST_DEVICE static constexpr int warp_column(int warp) {
    return warp % (kTile.columns / kTile.warp_columns) * kTile.warp_columns;
  }
};

}  // namespace fused_lora::kernels::lora_gemm
