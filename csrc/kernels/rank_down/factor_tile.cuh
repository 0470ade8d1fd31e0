// A warp's slice of the thin factor F in shared memory: kRanks ranks by kDepth of X's columns, in
// F's own dtype, in one of two layouts. How it comes from global memory, and how it becomes mma's B
// operand.
//
// The order of a sum's products is free, so a lane's share of k is chosen by what it can read at
// once: one 16-byte chunk of a row of X. With g = lane / 4 and t = lane % 4, of the slice's k a
// lane owns
//
//     k = kLaneDepth·t + j,  j < kLaneDepth
//
// where kLaneDepth is 8 for a 16-bit X and 4 for an fp32 one. F's fragment for the ranks 8n .. 8n+7
// is then F[k][8n+g] for the lane's own k.
#pragma once

#include <cstdint>

#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/ldmatrix.cuh"
#include "kernels/ptx/shared_address.cuh"
#include "kernels/tile/rank_window.cuh"
#include "kernels/tile/swizzle.cuh"

namespace fused_lora::kernels {

constexpr int kWarpLanes = 32;

// Which dimension of F is contiguous in shared memory.
enum class FactorLayout { kDepthContiguous, kRankContiguous };

// F as the kernel reads it. Element (c, j) lies at data + c·depth_stride + j·rank_stride.
struct FactorSlice {
  const void* data;
  int64_t depth_stride, rank_stride;
  int depth;         // of F: what lies beyond is zero
  RankWindow ranks;  // what lies outside is not used: zero, or F's own where a chunk holds both
  int first_rank;    // of the block's tile

  __device__ __forceinline__ bool uses(int rank, int count = 1) const {
    return ranks.overlaps(rank, count);
  }
};

template <typename Element_, FactorLayout kLayout, int kRanks_, int kDepth_>
struct FactorTile;

// Rows of ranks. 64 bytes hold kDepth numbers of X's own size: a fragment's eight rows of four
// chunks are then 512 consecutive bytes, and the warp reads them in the order of its lanes. fp32
// masters beside a 16-bit X take 128 bytes, and lane t reads chunks 2t and 2t+1, one at a time:
// even chunks and then odd ones. Two rows are read at once, so the odd row swaps the chunks of each
// pair.
template <typename Element_, int kRanks_, int kDepth_>
struct FactorTile<Element_, FactorLayout::kDepthContiguous, kRanks_, kDepth_> {
  using Element = Element_;
  static constexpr int kRanks = kRanks_, kDepth = kDepth_;
  static constexpr int kRowBytes = kDepth * static_cast<int>(sizeof(Element));
  static constexpr int kBytes = kRanks * kRowBytes;
  static constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(Element));
  static constexpr int kRowChunks = kRowBytes / kChunkBytes;
  static constexpr int kLaneDepth = kDepth / 4;
  static_assert(kRowChunks == 4 || kRowChunks == 8,
                "four lanes read a row, one or two chunks each");

  __device__ __forceinline__ static int offset(int rank, int chunk) {
    const int swap = kRowChunks == 8 ? rank & 1 : 0;
    return rank * kRowBytes + (chunk ^ swap) * kChunkBytes;
  }

  __device__ __forceinline__ static void copy_chunks(unsigned char* tile, const FactorSlice& factor,
                                                     int first_depth, int lane) {
    constexpr int kStep = kWarpLanes / kRowChunks;
    static_assert(kStep % 2 == 0, "a lane's rows all swap their chunks or none does");
    const int row = lane / kRowChunks, chunk = lane % kRowChunks;
    const int depth = first_depth + chunk * kChunkElements;
    int rank = factor.first_rank + row;
    const Element* source =
        static_cast<const Element*>(factor.data) + rank * factor.rank_stride + depth;
    const int64_t source_step = kStep * factor.rank_stride;
    const uint32_t target = ptx::shared_address(tile) + offset(row, chunk);
#pragma unroll 4
    for (int i = 0; i < kRanks / kStep; ++i) {
      ptx::cp_async_16_or_zeros(target + i * kStep * kRowBytes, source,
                                factor.uses(rank) && depth < factor.depth);
      source += source_step;
      rank += kStep;
    }
  }

  // Through registers, for any strides and alignment; the lanes lie along the depth. The loads of a
  // batch are under way together.
  __device__ __forceinline__ static void copy_elements(unsigned char* tile,
                                                       const FactorSlice& factor, int first_depth,
                                                       int lane) {
    constexpr int kStep = kWarpLanes / kDepth;  // ranks that the warp's lanes cover at once
    constexpr int kBatch = 8;
    static_assert(kRanks % (kBatch * kStep) == 0, "whole batches");
    const int column = lane % kDepth, depth = first_depth + column;
    const Element* source = static_cast<const Element*>(factor.data) + depth * factor.depth_stride;
#pragma unroll 1
    for (int first = lane / kDepth; first < kRanks; first += kBatch * kStep) {
      Element batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int rank = factor.first_rank + first + i * kStep;
        const bool inside = factor.uses(rank) && depth < factor.depth;
        batch[i] = inside ? source[rank * factor.rank_stride] : Element(0.0f);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        unsigned char* target = tile + offset(first + i * kStep, column / kChunkElements);
        reinterpret_cast<Element*>(target)[column % kChunkElements] = batch[i];
      }
    }
  }

  // 16-bit elements: pair[i] holds k 2i and 2i+1 of the lane's eight.
  __device__ __forceinline__ static void load_pairs(uint32_t (&pair)[4], const unsigned char* tile,
                                                    int fragment, int lane) {
    static_assert(sizeof(Element) == 2 && kLaneDepth == 8, "a lane's k are one chunk");
    const uint4 chunk =
        *reinterpret_cast<const uint4*>(tile + offset(8 * fragment + lane / 4, lane % 4));
    pair[0] = chunk.x, pair[1] = chunk.y, pair[2] = chunk.z, pair[3] = chunk.w;
  }

  // fp32 elements: k 4·quad .. 4·quad+3 of the lane's own.
  __device__ __forceinline__ static void load_quad(float (&value)[4], const unsigned char* tile,
                                                   int fragment, int quad, int lane) {
    static_assert(sizeof(Element) == 4, "four fp32 numbers are a chunk");
    const int chunk = kLaneDepth / 4 * (lane % 4) + quad;
    const float4 loaded =
        *reinterpret_cast<const float4*>(tile + offset(8 * fragment + lane / 4, chunk));
    value[0] = loaded.x, value[1] = loaded.y, value[2] = loaded.z, value[3] = loaded.w;
  }
};

// Rows of k, in the order (j, t): the rows that a fragment reads at once, one for each t, lie side
// by side.
template <typename Element_, int kRanks_, int kDepth_>
struct FactorTile<Element_, FactorLayout::kRankContiguous, kRanks_, kDepth_> {
  using Element = Element_;
  static constexpr int kRanks = kRanks_, kDepth = kDepth_;
  static constexpr int kRowBytes = kRanks * static_cast<int>(sizeof(Element));
  static constexpr int kBytes = kDepth * kRowBytes;
  static constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(Element));
  static constexpr int kRowChunks = kRowBytes / kChunkBytes;
  static constexpr int kLaneDepth = kDepth / 4;

  // ldmatrix reads eight rows of one column of chunks. Plain loads of fp32 read four rows of the
  // two chunks that hold a fragment's eight ranks: pairs of chunks are permuted, by t where a row
  // fills the banks, by t / 2 where two rows do.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    if (sizeof(Element) == 2) return swizzled<kRowBytes>(row, chunk);
    const int permutation = kRowChunks == 4 ? row & 2 : (row & 3) << 1;
    return row * kRowBytes + (chunk ^ permutation) * kChunkBytes;
  }

  // At most eight chunks of a row at once, 128 bytes: then the rows that the lanes copy at once are
  // those of whole groups of four, and the next ones are reached by one step along the depth.
  __device__ __forceinline__ static void copy_chunks(unsigned char* tile, const FactorSlice& factor,
                                                     int first_depth, int lane) {
    constexpr int kCopied = kRowChunks < 8 ? kRowChunks : 8;
    constexpr int kStep = kWarpLanes / kCopied, kDepthStep = kStep / 4;
    const int row = lane / kCopied, chunk = lane % kCopied;
    int depth = first_depth + kLaneDepth * (row % 4) + row / 4;
    const int rank = factor.first_rank + chunk * kChunkElements;
    const Element* source =
        static_cast<const Element*>(factor.data) + depth * factor.depth_stride + rank;
    const int64_t source_step = kDepthStep * factor.depth_stride;
#pragma unroll
    for (int i = 0; i < kDepth / kStep; ++i) {
      const bool inside = depth < factor.depth;
#pragma unroll
      for (int part = 0; part < kRowChunks / kCopied; ++part) {
        constexpr int kPartElements = kCopied * kChunkElements;
        ptx::cp_async_16_or_zeros(
            ptx::shared_address(tile + offset(i * kStep + row, part * kCopied + chunk)),
            source + part * kPartElements,
            inside && factor.uses(rank + part * kPartElements, kChunkElements));
      }
      source += source_step;
      depth += kDepthStep;
    }
  }

  __device__ __forceinline__ static void load_pairs(uint32_t (&pair)[4], const unsigned char* tile,
                                                    int fragment, int lane) {
    static_assert(sizeof(Element) == 2 && kLaneDepth == 8, "ldmatrix moves 16-bit elements");
    // Matrix i serves pair[i]: its rows 2t and 2t+1 are k 2i and 2i+1 of lane t.
    const int matrix = lane / 8, t = lane % 8 / 2, j = 2 * matrix + lane % 2;
    ptx::ldmatrix_x4_transposed(pair, ptx::shared_address(tile) + offset(4 * j + t, fragment));
  }

  __device__ __forceinline__ static void load_quad(float (&value)[4], const unsigned char* tile,
                                                   int fragment, int quad, int lane) {
    static_assert(sizeof(Element) == 4, "fp32 is read one number at a time");
    const int rank = 8 * fragment + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * (4 * quad + i) + lane % 4;
      const unsigned char* chunk = tile + offset(row, rank / kChunkElements);
      value[i] = reinterpret_cast<const float*>(chunk)[rank % kChunkElements];
    }
  }
};

}  // namespace fused_lora::kernels
