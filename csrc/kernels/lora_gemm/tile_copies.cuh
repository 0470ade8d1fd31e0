// lora_gemm's copies from global to shared memory: which chunks a thread copies, and from where.
//
// A stage holds X's tile, rows × 64 bytes of depth, and behind it W's: columns × 64 bytes where W's
// depth is contiguous, else depth × columns. Both are rows of 16-byte chunks under
// tile/swizzle.cuh.
#pragma once

#include <type_traits>

#include "kernels/lora_gemm/traits.h"
#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/special_registers.cuh"
#include "kernels/tile/swizzle.cuh"

namespace fused_lora::kernels::lora_gemm {

// Rows of `kRowBytes` in shared memory, copied a chunk a thread at a time. The chunks of one thread
// lie in one column of chunks, kRowStep rows apart, so that one swizzled offset and one column
// serve them all.
template <int kRows_, int kRowBytes_, int kThreads>
struct CopyShape {
  static constexpr int kRows = kRows_;
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kChunksPerRow = kRowBytes / kChunkBytes;
  static constexpr int kRowStep = kThreads / kChunksPerRow;
  static constexpr int kCopies = kRows / kRowStep;
  static_assert(kThreads % kChunksPerRow == 0 && kRows % kRowStep == 0,
                "the threads of a CTA divide a tile evenly");
  static_assert(kRowStep % 4 == 0, "a thread's rows share a swizzle");

  __device__ static int row() { return ptx::thread_x() / kChunksPerRow; }
  __device__ static int chunk() { return ptx::thread_x() % kChunksPerRow; }
};

// Where chunk `chunk` of a row of W's tile lies, from the tile's first byte.
template <typename Traits>
__device__ __forceinline__ constexpr int column_tile_offset(int row, int chunk) {
  if constexpr (Traits::kDepthContiguous) {
    return swizzled<kPackedTileBytes>(row, chunk);
  } else {
    constexpr int kRowBytes = Traits::kTile.columns * Traits::kElementBytes;
    return fragment_offset<Traits::kElementBytes, kRowBytes>(row, chunk);
  }
}

// A thread's chunks of an operand whose tile rows are the operand's rows (X, and W where its depth
// is contiguous). Rows beyond the last are clamped to it: what they add is never stored.
//
// One pointer for the CTA's tile and an offset a row, in chunks: a 32-bit offset that one
// multiply-add widens costs half the registers and instructions of a pointer a row, and in chunks
// it spans 64 GiB.
template <typename Shape>
struct RowCopies {
  const char* from;
  uint32_t offset[Shape::kCopies];

  __device__ void begin(const void* data, int64_t pitch, int first_row, int rows) {
    from = static_cast<const char*>(data) + first_row * pitch;
    const uint32_t chunk_pitch = static_cast<uint32_t>(pitch / kChunkBytes);
    const int row = Shape::row(), chunk = Shape::chunk(), last = rows - 1 - first_row;
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      offset[i] = min(row + i * Shape::kRowStep, last) * chunk_pitch + chunk;
    }
  }
  __device__ const char* source(int i) const {
    return from + static_cast<uint64_t>(offset[i]) * kChunkBytes;
  }
  // `left`: bytes of a row from this tile on. Chunks beyond are zeros.
  __device__ void copy_part(uint32_t shared, int left) const {
    const bool inside = Shape::chunk() * kChunkBytes < left;
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      ptx::cp_async_16_or_zeros(shared + i * Shape::kRowStep * Shape::kRowBytes, source(i), inside);
    }
  }
  __device__ void copy(uint32_t shared) const {
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      ptx::cp_async_16(shared + i * Shape::kRowStep * Shape::kRowBytes, source(i));
    }
  }
};

// The same for W where its columns are contiguous: a tile row is one depth. Chunks of columns
// beyond the last are clamped to it; depths beyond are zeros.
template <typename Shape>
struct DepthCopies {
  const char* from;
  uint32_t offset[Shape::kCopies];

  __device__ void begin(const void* data, int64_t pitch, int first_chunk, int chunks) {
    from = static_cast<const char*>(data) + static_cast<int64_t>(first_chunk) * kChunkBytes;
    const uint32_t chunk_pitch = static_cast<uint32_t>(pitch / kChunkBytes);
    const int row = Shape::row(), chunk = min(Shape::chunk(), chunks - 1 - first_chunk);
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      offset[i] = (row + i * Shape::kRowStep) * chunk_pitch + chunk;
    }
  }
  __device__ const char* source(int i) const {
    return from + static_cast<uint64_t>(offset[i]) * kChunkBytes;
  }
  // `left`: depths from this tile on.
  __device__ void copy_part(uint32_t shared, int left) const {
    const int row = Shape::row();
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      ptx::cp_async_16_or_zeros(shared + i * Shape::kRowStep * Shape::kRowBytes, source(i),
                                row + i * Shape::kRowStep < left);
    }
  }
  __device__ void copy(uint32_t shared) const {
#pragma unroll
    for (int i = 0; i < Shape::kCopies; ++i) {
      ptx::cp_async_16(shared + i * Shape::kRowStep * Shape::kRowBytes, source(i));
    }
  }
};

// A thread's chunks of one tile of the reduction: X's, and W's behind them.
template <typename Traits>
struct TileCopies {
  static constexpr Tile kTile = Traits::kTile;
  static constexpr int kRowTileBytes = kTile.rows * kPackedTileBytes;
  static constexpr bool kContiguous = Traits::kDepthContiguous;
  using RowShape = CopyShape<kTile.rows, kPackedTileBytes, Traits::kThreads>;
  using ColumnShape =
      CopyShape<kContiguous ? kTile.columns : Traits::kDepth,
                kContiguous ? kPackedTileBytes : kTile.columns * Traits::kElementBytes,
                Traits::kThreads>;

  RowCopies<RowShape> rows;
  std::conditional_t<kContiguous, RowCopies<ColumnShape>, DepthCopies<ColumnShape>> columns;

  // Where the thread's first chunks go, from a stage's first byte.
  __device__ static uint32_t row_offset() {
    return swizzled<kPackedTileBytes>(RowShape::row(), RowShape::chunk());
  }
  __device__ static uint32_t column_offset() {
    return kRowTileBytes + column_tile_offset<Traits>(ColumnShape::row(), ColumnShape::chunk());
  }

  // The first tile of the reduction.
  __device__ void begin_rows(const void* data, int64_t pitch, int first, int count) {
    rows.begin(data, pitch, first, count);
  }
  __device__ void begin_columns(const void* data, int64_t pitch, int first, int count) {
    if constexpr (kContiguous) {
      columns.begin(data, pitch, first, count);
    } else {
      constexpr int kElements = kChunkBytes / Traits::kElementBytes;
      columns.begin(data, pitch, first / kElements, count / kElements);
    }
  }
  // From one tile to the next, in W's storage.
  __device__ static int64_t column_step(int64_t pitch) {
    return kContiguous ? kPackedTileBytes : Traits::kDepth * pitch;
  }
  // `left`: depths from this tile on; what is beyond is zeros.
  __device__ void copy_part(uint32_t rows_to, uint32_t columns_to, int left) const {
    rows.copy_part(rows_to, left * Traits::kElementBytes);
    columns.copy_part(columns_to, kContiguous ? left * Traits::kElementBytes : left);
  }
  __device__ void copy(uint32_t rows_to, uint32_t columns_to) const {
    rows.copy(rows_to);
    columns.copy(columns_to);
  }
};

}  // namespace fused_lora::kernels::lora_gemm
