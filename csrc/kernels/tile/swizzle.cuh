// Tiles in shared memory: rows of 16-byte chunks, the chunks of a row permuted so that the eight
// rows that ldmatrix reads at once, in one column of chunks, touch all 32 banks once.
#pragma once

#include <cstdint>

namespace fused_lora::kernels {

constexpr int kChunkBytes = 16;

// Byte offset of a chunk. Rows of 64 bytes: two fill the banks, so row / 2 picks the permutation of
// four. Rows of 128 bytes and more: each begins at bank 0, so row % 8 does.
template <int kRowBytes>
__device__ __forceinline__ constexpr int swizzled(int row, int chunk) {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes % 128 == 0,
                "rows of 32 or 64 bytes, or whole multiples of the 128 bytes that the banks hold");
  constexpr int kChunks = kRowBytes / kChunkBytes;
  const int permutation = kChunks == 2 ? (row >> 2) & 1 : kChunks == 4 ? (row >> 1) & 3 : row & 7;
  return row * kRowBytes + (chunk ^ permutation) * kChunkBytes;
}

// The same for fragments of 32-bit elements, whose eight columns are two chunks: pairs of chunks
// are permuted, so that four rows of a pair touch all banks once.
template <int kRowBytes>
__device__ __forceinline__ constexpr int swizzled_pairs(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "rows of whole pairs of chunks");
  const int permutation = kRowBytes == 64 ? (row >> 1) & 1 : row & 3;
  return row * kRowBytes + (chunk ^ (2 * permutation)) * kChunkBytes;
}

// The one of the two for elements of kElementBytes.
template <int kElementBytes, int kRowBytes>
__device__ __forceinline__ constexpr int fragment_offset(int row, int chunk) {
  if constexpr (kElementBytes == 4) {
    return swizzled_pairs<kRowBytes>(row, chunk);
  } else {
    return swizzled<kRowBytes>(row, chunk);
  }
}

}  // namespace fused_lora::kernels
