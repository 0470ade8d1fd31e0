// From a warp's sums to its part of the output, with the bias and what is added beside it.
#pragma once

#include "kernels/lora_gemm/fragments.cuh"
#include "kernels/ptx/cp_async.cuh"

namespace fused_lora::kernels::lora_gemm {

// Where a warp's part goes. Pitches are bytes from one row to the next.
struct Output {
  void* out;  // rows×columns
  int64_t pitch;
  const void* bias;  // columns, or null
  int rows, columns;
  int first_row, first_column;   // of the warp
  const void* addend = nullptr;  // rows×columns, out itself or apart; or null
  int64_t addend_pitch = 0;
};

template <typename Traits>
class Epilogue {
  using T = typename Traits::T;
  static constexpr int kBytes = Traits::kElementBytes;
  static constexpr int kRowBytes = Traits::kTile.warp_columns * kBytes;
  static constexpr int kChunkElements = kChunkBytes / kBytes;
  static constexpr int kChunksPerRow = kRowBytes / kChunkBytes;
  static constexpr int kRowsAtOnce = 32 / kChunksPerRow;  // that a warp moves, a chunk a lane

 public:
  // Shared memory of one warp: its part of the output.
  static constexpr int kWarpBytes = Traits::kTile.warp_rows * kRowBytes;
  static_assert(kWarpBytes * Traits::kWarps <= Traits::kSharedBytes, "the stages hold it");

  // By way of shared memory, so that a warp loads and stores whole sectors, 16 bytes a lane.
  // `staged`: kWarpBytes of the warp's own, which nobody reads any more.
  __device__ static void store(Accumulators<Traits>& sums, const Output& to, uint32_t staged) {
    if (to.bias != nullptr) add_bias(sums, to);
    if (to.addend != nullptr) add(sums, to, staged);
    const bool chunks = in_chunks(to.out, to.pitch, to.columns);
    const int chunk = lane() % kChunksPerRow;
    const int column = to.first_column + chunk * kChunkElements;
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
      stage(staged + 16 * i * kRowBytes, sums[i]);
      __syncwarp();
#pragma unroll
      for (int r = 16 * i; r < 16 * (i + 1); r += kRowsAtOnce) {
        const int within = r + lane() / kChunksPerRow, row = to.first_row + within;
        const uint4 values = ptx::load_shared_128(staged + offset(within, chunk));
        if (row >= to.rows) continue;
        char* address =
            static_cast<char*>(to.out) + row * to.pitch + static_cast<int64_t>(column) * kBytes;
        if (chunks) {
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

  // Whether rows of a matrix can be moved by whole chunks.
  __device__ static bool in_chunks(const void* data, int64_t pitch, int columns) {
    const auto row_bytes = static_cast<int64_t>(columns) * kBytes;
    return (reinterpret_cast<int64_t>(data) | pitch | row_bytes) % kChunkBytes == 0;
  }

  // The whole of the warp's part is on its way at once: nothing else hides how long it takes where
  // the reduction is short.
  __device__ static void add(Accumulators<Traits>& sums, const Output& to, uint32_t staged) {
    const bool chunks = in_chunks(to.addend, to.addend_pitch, to.columns);
    const int first = lane() / kChunksPerRow, chunk = lane() % kChunksPerRow;
    const int column = to.first_column + chunk * kChunkElements;
    const char* source = static_cast<const char*>(to.addend) +
                         (to.first_row + first) * to.addend_pitch +
                         static_cast<int64_t>(column) * kBytes;
#pragma unroll 4
    for (int r = first; r < Traits::kTile.warp_rows; r += kRowsAtOnce) {
      const bool in_rows = to.first_row + r < to.rows;
      const uint32_t target = staged + offset(r, chunk);
      if (chunks) {
        ptx::cp_async_16_or_zeros(target, source, in_rows && column < to.columns);
      } else {
        uint4 values = {};
        T* const each = reinterpret_cast<T*>(&values);
#pragma unroll
        for (int e = 0; e < kChunkElements; ++e) {
          if (in_rows && column + e < to.columns) each[e] = reinterpret_cast<const T*>(source)[e];
        }
        ptx::store_shared_128(target, values);
      }
      source += kRowsAtOnce * to.addend_pitch;
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kColumnFragments; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 pair = load_pair(staged + pair_offset(16 * i + 8 * half, j));
          sums[i][j][2 * half] += pair.x;
          sums[i][j][2 * half + 1] += pair.y;
        }
      }
    }
  }

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

  // Where the lane's pair of a fragment lies. row: the fragment's first of eight.
  __device__ static int pair_offset(int row, int fragment) {
    const int own = row + lane() / 4, pair = lane() % 4;
    return kBytes == 4 ? offset(own, 2 * fragment + pair / 2) + pair % 2 * 8
                       : offset(own, fragment) + pair * 4;
  }

  __device__ static float2 load_pair(uint32_t from) {
    if constexpr (kBytes == 4) {
      const uint2 pair = ptx::load_shared_64(from);
      return {__uint_as_float(pair.x), __uint_as_float(pair.y)};
    } else {
      return unpack_pair<T>(ptx::load_shared_32(from));
    }
  }

  __device__ static void stage(uint32_t staged, const float (&sums)[Traits::kColumnFragments][4]) {
#pragma unroll
    for (int j = 0; j < Traits::kColumnFragments; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t to = staged + pair_offset(8 * half, j);
        const float low = sums[j][2 * half], high = sums[j][2 * half + 1];
        if constexpr (kBytes == 4) {
          ptx::store_shared_64(to, __float_as_uint(low), __float_as_uint(high));
        } else {
          ptx::store_shared_32(to, pack_pair<T>(low, high));
        }
      }
    }
  }
};

}  // namespace fused_lora::kernels::lora_gemm
