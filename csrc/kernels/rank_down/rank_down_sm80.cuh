// rank-down on tensor cores, sm_80 and newer:
//
//     out = alpha · drop(X) · F        X: rows×columns   F: columns×rank   out: rows×rank
//
// h from x and Aᵀ, g from dy and B. X is long and comes from DRAM once; all else has the rank for
// one of its sizes. So the kernel is bound by reading X, and is made of independent streams:
//
// 1. A block owns kRows rows and kRanks ranks, and sums over all of X's columns. Its four warps
//    share the columns: slice s, 64 bytes of each row of X, is warp s % 4's. A warp copies its own
//    slices of X and F and waits for its own copies, so the main loop has no barrier of the block.
//    The four sums are added once, at the end, in the order of the warps. Nothing is split over
//    blocks: no workspace, no atomic, and the same bits in any order of the blocks.
// 2. A row's slice is four chunks of 16 bytes. Lane 4g + t copies chunk t of rows g, g+8, .. and
//    reads the same chunks back, so X crosses shared memory without a swizzle, a bank conflict or
//    ldmatrix: the order of a sum's products is free, and F's fragments follow X's
//    (factor_tile.cuh). A chunk of 16-bit numbers is also what one Philox call decides, so the
//    dropout mask is applied to registers, by one call for each chunk.
// 3. Chunks outside of X or of F are zeros, in both operands: 0 · NaN is not 0.
//
// Products:
//
//     kHalf         m16n8k16 on 16-bit numbers. fp32 masters stay fp32 in shared memory and are
//                   rounded in registers: F has no 16-bit copy anywhere.
//     kHalfMasters  m16n8k8 in tf32. X is exact in it, F = high + low, both tf32: two
//                   instructions, which leave about 2^-22 of F.
//     kTf32         m16n8k8 in tf32, both operands rounded.
//
// Shared memory of a block: kStages × 4 warps × (kRows·64 bytes of X + kRanks·64 bytes of F, 128 of
// masters beside a 16-bit X). At the end a warp's part holds its sums, kRows·kRanks·4 bytes.
//
//     tile    F in X's dtype           fp32 masters
//     16×16   6 stages × 8 KiB = 48    4 × 12 = 48
//     32×16   4 × 12 = 48              3 × 16 = 48
//     32×32   3 × 16 = 48              3 × 24 = 72
//     64×32   3 × 24 = 72              3 × 32 = 96
//     64×64   3 × 32 = 96              2 × 48 = 96
//
// With 48 KiB two blocks share a multiprocessor on every device, and 96 KiB is what fits one where
// it has the least (99 KiB: sm_86, sm_89, sm_120). 128 threads: a thread of the 64×64 tile holds
// 128 accumulators, which leaves room for two blocks' registers.
//
// Where rows have adapters of their own (row_adapters), of F's ranks only those come to shared
// memory that the block's rows use, from the first to the last; a block none of whose ranks is used
// sums nothing. A sum is of one row of X and one column of F, so that what one adapter holds does
// not reach another's rows.
//
// Several factors may meet one X, with a mask, ranks and results of their own: those of projections
// that share their input. Each has tiles of its own.
//
// The blocks behind those of the products pack the partners, the other adapter matrices, for
// lora_gemm (tile/pack.cuh). They come last because they are short: they fill the gaps of the last
// round.
#pragma once

#include <cstdint>

#include "kernels/ptx/cp_async.cuh"
#include "kernels/rank_down/finish.cuh"
#include "kernels/rank_down/products.cuh"
#include "kernels/rank_down/traits.cuh"

namespace fused_lora::kernels {

// The member that a tile of ranks is of.
__device__ __forceinline__ const RankDownMember& member_of_tile(const RankDownParams& p, int tile) {
  int member = 0;
#pragma unroll
  for (int i = 1; i < kMostCalls; ++i) {
    if (i < p.count && tile >= p.members[i].first_tile) member = i;
  }
  return p.members[member];
}

template <typename Traits>
__device__ __forceinline__ void pack_partner(const RankDownParams& p, int64_t block,
                                             unsigned char* shared) {
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const PackFactorParams& partner = p.members[i].partner;
    if (block < partner.blocks) {
      pack_factor<typename Traits::T, Traits::kArithmetic, Traits::kThreads>(
          partner, block, reinterpret_cast<float*>(shared));
      return;
    }
    block -= partner.blocks;
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    rank_down_kernel(const __grid_constant__ RankDownParams p) {
  using Tile = typename Traits::Tile;
  extern __shared__ __align__(128) unsigned char shared[];
  if (blockIdx.x >= p.blocks) {
    pack_partner<Traits>(p, blockIdx.x - p.blocks, shared);
    return;
  }

  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  // The tiles of ranks that share rows of X run side by side, so that X comes from DRAM once.
  const int64_t first_row = blockIdx.x / p.rank_tiles * static_cast<int64_t>(Traits::kRows);
  const int tile = static_cast<int>(blockIdx.x % p.rank_tiles);
  const RankDownMember& m = member_of_tile(p, tile);
  const int first_rank = (tile - m.first_tile) * Traits::kRanks;
  const int rows = static_cast<int>(min(static_cast<int64_t>(Traits::kRows), p.rows - first_row));
  const RankWindow window = window_of_rows(m.row_adapters, first_row, rows,
                                           {first_rank, min(first_rank + Traits::kRanks, m.rank)});
  const FactorSlice factor{
      m.factor, m.factor_depth_stride, m.factor_rank_stride, p.columns, window, first_rank};

  unsigned char* const stages = shared + warp * Traits::kWarpBytes;
  const int64_t lane_row = first_row + lane / 4;
  const unsigned char* const x =
      p.x + lane_row * p.x_row_bytes + lane % 4 * static_cast<int64_t>(kChunkBytes);
  const int lane_rows =
      static_cast<int>(min(static_cast<int64_t>(Traits::kRows), p.rows - lane_row));
  // A block whose ranks none of its rows uses has zeros to write and nothing to sum.
  const int slices =
      window.empty() ? 0 : (p.columns + Traits::kSliceDepth - 1) / Traits::kSliceDepth;

  const auto copy = [&](int slice, int stage) {
    unsigned char* const x_tile = stages + stage * Traits::kStageBytes;
    const int column = slice * Traits::kSliceDepth;
    const bool in_columns = column + lane % 4 * Traits::kLaneDepth < p.columns;
    const unsigned char* source = x + slice * static_cast<int64_t>(Traits::kSliceBytes);
    const uint32_t target = ptx::shared_address(x_tile) + lane * kChunkBytes;
#pragma unroll
    for (int i = 0; i < Traits::kRows / 8; ++i) {
      ptx::cp_async_16_or_zeros(target + i * kWarpLanes * kChunkBytes, source,
                                in_columns && 8 * i < lane_rows);
      source += 8 * p.x_row_bytes;
    }
    unsigned char* const factor_tile = x_tile + Traits::kXBytes;
    if constexpr (Traits::kLayout == FactorLayout::kDepthContiguous) {
      if (m.factor_by_element) {
        Tile::copy_elements(factor_tile, factor, column, lane);
        return;
      }
    }
    Tile::copy_chunks(factor_tile, factor, column, lane);
  };

  Accumulators<Traits> sums = {};

  // A group of copies for every slice, also where there is none left to copy: the waits count
  // groups.
#pragma unroll
  for (int stage = 0; stage < Traits::kStages - 1; ++stage) {
    const int slice = warp + stage * Traits::kWarps;
    if (slice < slices) copy(slice, stage);
    ptx::cp_async_commit();
  }
  int stage = 0;
  for (int slice = warp; slice < slices; slice += Traits::kWarps) {
    ptx::cp_async_wait<Traits::kStages - 2>();
    // The other lanes' copies have landed too, and all lanes are done with the stage that is next
    // filled.
    __syncwarp();
    const int next = slice + (Traits::kStages - 1) * Traits::kWarps;
    if (next < slices) copy(next, stage == 0 ? Traits::kStages - 1 : stage - 1);
    ptx::cp_async_commit();

    const unsigned char* const x_tile = stages + stage * Traits::kStageBytes;
    XFragments<Traits> fragments;
    fragments.load(x_tile, lane);
    if (m.dropout.active()) {
      // Read here and not before the loop, or Philox's 20 round keys would be kept in registers.
      const DropoutKey key = dropout_key(m.dropout);
      fragments.drop(key, lane_row, slice * Traits::kSliceDepth, lane);
    }
    if constexpr (!Traits::kHalf) {
      multiply_tf32<Traits>(sums, fragments, x_tile + Traits::kXBytes, lane);
    } else if constexpr (sizeof(typename Traits::Factor) == 4) {
      multiply_rounded<Traits>(sums, fragments, x_tile + Traits::kXBytes, lane);
    } else {
      multiply_pairs<Traits>(sums, fragments, x_tile + Traits::kXBytes, lane);
    }
    stage = stage == Traits::kStages - 1 ? 0 : stage + 1;
  }

  // A warp's sums take the place of its stages, which are empty: every slice that was copied was
  // read.
  __syncwarp();
  write_sums<Traits>(stages, sums, lane);
  __syncthreads();
  finish<Traits>(m, shared, first_row, rows, first_rank);
}

}  // namespace fused_lora::kernels
