// From a warp's sums to its part of the output, with the bias.
#pragma once

#include "kernels/lora_gemm/fragments.cuh"

namespace fused_lora::kernels::lora_gemm {

// Where a warp's part goes. out: rows×columns, dense. bias: columns, or null.
struct Output {
  void* out;
  const void* bias;
  int rows, columns;
  int first_row, first_column;  // of the warp
};

template <typename Traits>
class Epilogue {
  using T = typename Traits::T;
  static constexpr int kBytes = Traits::kElementBytes;
  static constexpr int kRowBytes = Traits::kTile.warp_columns * kBytes;
  static constexpr int kChunkElements = kChunkBytes / kBytes;

 public:
  // Shared memory of one warp.
  static constexpr int kWarpBytes = 16 * kRowBytes;
  static_assert(kWarpBytes * Traits::kWarps <= Traits::kSharedBytes, "the stages hold it");

  // Sixteen rows at a time go through shared memory, so that a warp stores whole sectors, 16 bytes
  // a lane. `staged`: kWarpBytes of the warp's own, which nobody reads any more.
  __device__ static void store(Accumulators<Traits>& sums, const Output& to, uint32_t staged) {
    constexpr int kChunksPerRow = kRowBytes / kChunkBytes, kRowsAtOnce = 32 / kChunksPerRow;
    if (to.bias != nullptr) add_bias(sums, to);
    const int64_t pitch = static_cast<int64_t>(to.columns) * kBytes;
    const bool whole_chunks =
        (reinterpret_cast<uintptr_t>(to.out) | static_cast<uintptr_t>(pitch)) % kChunkBytes == 0;
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
      if (i > 0) __syncwarp();  // the rows before these have been read
      stage(staged, sums[i]);
      __syncwarp();
#pragma unroll
      for (int r = 0; r < 16; r += kRowsAtOnce) {
        const int within = r + lane() / kChunksPerRow, chunk = lane() % kChunksPerRow;
        const int row = to.first_row + 16 * i + within;
        const int column = to.first_column + chunk * kChunkElements;
        const uint4 values = ptx::load_shared_128(staged + offset(within, chunk));
        if (row >= to.rows) continue;
        char* address =
            static_cast<char*>(to.out) + row * pitch + static_cast<int64_t>(column) * kBytes;
        if (whole_chunks) {
          if (column < to.columns) *reinterpret_cast<uint4*>(address) = values;
        } else {
          const T* each = reinterpret_cast<const T*>(&values);
#pragma unroll
          for (int e = 0; e < kChunkElements; ++e) {
            if (column + e < to.columns) reinterpret_cast<T*>(address)[e] = each[e];
          }
        }
      }
    }
  }

 private:
  __device__ static int lane() { return ptx::thread_x() % 32; }

  __device__ static void add_bias(Accumulators<Traits>& sums, const Output& to) {
    const T* bias = static_cast<const T*>(to.bias);
    const int first = to.first_column + lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < Traits::kColumnFragments; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = first + 8 * j + c;
        const float value = column < to.columns ? to_float(bias[column]) : 0.0f;
#pragma unroll
        for (int i = 0; i < Traits::kRowFragments; ++i) {
          sums[i][j][c] += value;
          sums[i][j][c + 2] += value;
        }
      }
    }
  }

  __device__ static int offset(int row, int chunk) {
    return fragment_offset<kBytes, kRowBytes>(row, chunk);
  }

  __device__ static void stage(uint32_t staged, const float (&sums)[Traits::kColumnFragments][4]) {
    const int row = lane() / 4, pair = lane() % 4;
#pragma unroll
    for (int j = 0; j < Traits::kColumnFragments; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = sums[j][2 * half], high = sums[j][2 * half + 1];
        if constexpr (kBytes == 4) {
          const int at = offset(row + 8 * half, 2 * j + pair / 2) + pair % 2 * 8;
          ptx::store_shared_64(staged + at, __float_as_uint(low), __float_as_uint(high));
        } else {
          const int at = offset(row + 8 * half, j) + pair * 4;
          ptx::store_shared_32(staged + at, pack_pair<T>(low, high));
        }
      }
    }
  }
};

}  // namespace fused_lora::kernels::lora_gemm
