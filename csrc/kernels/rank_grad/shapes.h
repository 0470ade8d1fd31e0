// The shapes of rank-grad's tiles, for host and device.
#pragma once

#include "kernels/stages.h"

namespace fused_lora::kernels::rank_grad {

// Bytes of X in one stage of a block: 512 chunks of 16, four a thread. Two blocks an SM with three
// stages under way ask for 48 KiB at a time, which hides the latency of HBM at the bandwidth of
// every device.
constexpr int kStageBytes = 8192;
constexpr int kThreads = 128;

// Ranks of a block. More take more blocks beside each other, which find X in L2.
constexpr int rank_tile(int64_t rank) {
  return rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
}

// Columns of a block. Every block of a row's reads all of `low`: with many ranks 64 columns of X
// would be no more bytes than `low`'s, and each warp would load and split as much of it for 16
// columns as for 32.
constexpr int column_tile(int rank_tile) {
  return rank_tile == 16 ? 64 : 128;
}

// Rows of a stage: the rows are split in whole ones.
constexpr int row_tile(int rank_tile, int element_bytes) {
  return kStageBytes / (column_tile(rank_tile) * element_bytes);
}

// Rows of a block that computes g and dB by one read of dy: see rank_down_grad.cuh.
constexpr int kSliceRows = 128;

}  // namespace fused_lora::kernels::rank_grad
