// The thin operand, rows × rank, from global memory to its tile in shared memory.
//
// Its rows are rank elements long, whatever the rank is. Where they are whole 16-byte chunks they
// are copied so; else in words of 4 bytes, which fp32 always is; 16-bit elements of an odd rank one
// by one, through registers. Ranks and rows beyond the operand become zeros.
#pragma once

#include "kernels/ptx/cp_async.cuh"
#include "kernels/rank_grad/depth_tile.cuh"
#include "kernels/stages.h"

namespace fused_lora::kernels::rank_grad {

enum class ThinUnit : int { kChunks, kWords, kElements };

// data: aligned to its elements.
inline ThinUnit thin_unit(const void* data, int64_t stride, int64_t rank, int64_t element_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  const auto bytes = static_cast<uintptr_t>((rank | stride) * element_bytes);
  if ((address | bytes) % kChunkBytes == 0) return ThinUnit::kChunks;
  return (address | bytes) % 4 == 0 ? ThinUnit::kWords : ThinUnit::kElements;
}

struct Thin {
  const void* data;
  int rank;
  int stride;  // of its rows
  ThinUnit unit;
};

inline Thin thin_of(const RankGrad& stage, int64_t element_bytes) {
  const int64_t stride = stride_or_dense(stage.low_stride, stage.rank);
  return {stage.low, static_cast<int>(stage.rank), static_cast<int>(stride),
          thin_unit(stage.low, stride, stage.rank, element_bytes)};
}

// Rows row .. row + kRows - 1, of which `rows` are there, and Tile::kColumns ranks from first_rank
// on.
template <typename Tile, int kRows, int kThreads>
__device__ __forceinline__ void copy_thin(uint32_t tile, const Thin& thin, int64_t row, int rows,
                                          int first_rank) {
  using Element = typename Tile::Element;
  const int thread = threadIdx.x;
  const Element* from = static_cast<const Element*>(thin.data) + row * thin.stride + first_rank;
  const int ranks = thin.rank - first_rank;
  if (thin.unit == ThinUnit::kChunks) {
    constexpr int kElements = kChunkBytes / Tile::kElementBytes;
    constexpr int kCopies = kRows * Tile::kChunks / kThreads;
    static_assert(kRows * Tile::kChunks % kThreads == 0, "every thread copies as many chunks");
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int index = thread + i * kThreads;
      const int place = index / Tile::kChunks, chunk = index % Tile::kChunks;
      const int depth = Tile::depth_at(place), column = chunk * kElements;
      ptx::cp_async_16_or_zeros(tile + Tile::offset(place, chunk),
                                from + static_cast<int64_t>(depth) * thin.stride + column,
                                depth < rows && column < ranks);
    }
  } else if (thin.unit == ThinUnit::kWords) {
    constexpr int kElements = 4 / Tile::kElementBytes, kWords = Tile::kRowBytes / 4;
#pragma unroll 4
    for (int index = thread; index < kRows * kWords; index += kThreads) {
      const int place = index / kWords, column = index % kWords * kElements;
      const int depth = Tile::depth_at(place);
      ptx::cp_async_4_or_zeros(tile + Tile::element_offset(place, column),
                               from + static_cast<int64_t>(depth) * thin.stride + column,
                               depth < rows && column < ranks);
    }
  } else if constexpr (!Tile::kWide) {
#pragma unroll 8
    for (int index = thread; index < kRows * Tile::kColumns; index += kThreads) {
      const int depth = index / Tile::kColumns, column = index % Tile::kColumns;
      uint16_t bits = 0;
      if (depth < rows && column < ranks) {
        bits = reinterpret_cast<const uint16_t*>(
            from)[static_cast<int64_t>(depth) * thin.stride + column];
      }
      ptx::store_shared_16(tile + Tile::element_offset(depth, column), bits);
    }
  }
}

}  // namespace fused_lora::kernels::rank_grad
