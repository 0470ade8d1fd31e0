// The tiles of the plain kernels' products, and how an operand's tile lies in shared memory.
#pragma once

#include <cstdint>

namespace fused_lora::kernels::plain {

constexpr int kThreads = 256;
constexpr int kWarpLanes = 32;

// A block's share of C = L · R: ROWS×COLUMNS of C, DEPTH of the reduction at a time.
//
// A thread sums PATCH×PATCH elements, a warp 4·PATCH × 8·PATCH: then a step of the reduction reads
// 4 and 8 distinct chunks of 16 bytes for each 4 of the patch, one pass over the banks each. Where
// the warps are more than C's tile needs they share its reduction: slice s of SLICES takes the s-th
// part of each tile's depth, and the sums of the slices are added in their order at the end.
template <int ROWS, int COLUMNS, int DEPTH, int PATCH>
struct Tile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS, kDepth = DEPTH, kPatch = PATCH;
  static constexpr int kWarpRows = 4 * PATCH, kWarpColumns = 8 * PATCH;
  static constexpr int kWarpsAlongRows = ROWS / kWarpRows;
  static constexpr int kWarpsAlongColumns = COLUMNS / kWarpColumns;
  static constexpr int kSliceWarps = kWarpsAlongRows * kWarpsAlongColumns;
  static constexpr int kSlices = kThreads / kWarpLanes / kSliceWarps;
  static constexpr int kSliceDepth = DEPTH / kSlices;
  // On a multiprocessor: two cover each other's latency. A patch of 64 sums leaves registers for
  // one, and so do the loads of a deep tile, which serves where there are fewer blocks than
  // multiprocessors.
  static constexpr int kBlocks = PATCH == 4 && DEPTH <= 64 ? 2 : 1;

  static_assert(PATCH % 4 == 0, "a patch is made of chunks of four");
  static_assert(ROWS % kWarpRows == 0 && COLUMNS % kWarpColumns == 0, "warps fill the tile");
  static_assert(kSlices * kSliceWarps * kWarpLanes == kThreads, "every warp has a part");
  static_assert(kSliceDepth % 4 == 0, "a slice's steps come in fours, see SharedOperand");

  // Shared memory, in floats: L's tile and R's, and after the reduction the sums of all slices but
  // the first.
  static constexpr int kLeftFloats = ROWS * DEPTH, kRightFloats = COLUMNS * DEPTH;
  static constexpr int kSumFloats = (kSlices - 1) * ROWS * COLUMNS;
  static constexpr int kSharedFloats =
      kLeftFloats + kRightFloats > kSumFloats ? kLeftFloats + kRightFloats : kSumFloats;
};

// Where element (extent e, depth d) of an operand's tile lies in shared memory, in floats.
//
// A row holds one depth. Reads take four neighbours along the extent at once; writes come along the
// extent or along the depth, whichever is contiguous in global memory. So that 32 neighbours along
// either lie in 32 banks, the chunks of four are permuted within the eight that the banks hold by
// three bits of d, and the elements of a chunk are rotated by the other two. The reader knows d % 4
// at compile time: to it a rotation is but a choice of registers.
template <int EXTENT, int DEPTH>
struct SharedOperand {
  static_assert(EXTENT == 16 || EXTENT % 32 == 0, "rows of half the banks or of whole multiples");

  // Which bits of d permute the chunks. A tile 16 deep is written at two extents at once, eight
  // apart and so different in bit 1 of the chunk, which bit 4 of d permutes: there it is zero. A
  // row of 16 extents fills half the banks, and bit kHalf of d says which: the two depths that are
  // written along such rows at once differ in it, for they are as far apart as a thread's elements
  // are many.
  static constexpr int kHalf = EXTENT == 16 && EXTENT * DEPTH / kThreads == 4 ? 2 : 3;
  static constexpr int kOther = 5 - kHalf;
  static_assert(EXTENT != 16 || EXTENT * DEPTH / kThreads == 1 << kHalf, "four or eight elements");

  __device__ __forceinline__ static int permutation(int d) {
    return ((d >> kOther) & 1) | ((d >> kHalf) & 1) << 2 | ((d >> 4) & 1) << 1;
  }
  __device__ __forceinline__ static int row_start(int d) {
    if constexpr (EXTENT != 16) return d * EXTENT;
    const int low = d & ((1 << kHalf) - 1), high = d >> (kHalf + 1);
    return (high << kHalf | low) * 32;
  }
  // Of the chunk that holds extents 4·chunk … 4·chunk+3, for d to d+3 where d is a multiple of
  // four.
  __device__ __forceinline__ static int chunk_start(int chunk, int d) {
    return (chunk ^ permutation(d)) * 4;
  }
  __device__ __forceinline__ static constexpr int within_chunk(int e, int d) { return (e + d) & 3; }
  __device__ __forceinline__ static int offset(int e, int d) {
    return row_start(d) + chunk_start(e >> 2, d) + within_chunk(e, d);
  }
};

}  // namespace fused_lora::kernels::plain
