// A block's tile of C = L · R with fp32 products and sums: the core of the plain kernels.
//
// The reduction goes tile by tile: what was fetched into registers is put into shared memory, the
// next tile's loads are issued, and the warps multiply. One tile in shared memory and one in
// registers keep loads under way during the arithmetic without the second buffer that would halve
// the blocks on an SM.
#pragma once

#include "kernels/plain/operand.cuh"
#include "kernels/plain/tile.cuh"

namespace fused_lora::kernels::plain {

template <typename T>
class Product {
 public:
  static constexpr int kPatch = T::kPatch;
  static constexpr int kChunks = kPatch / 4;

  // shared: T::kSharedFloats, aligned to 16 bytes.
  __device__ __forceinline__ explicit Product(float* shared) : shared_(shared) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
    const int in_slice = warp % T::kSliceWarps;
    slice_ = warp / T::kSliceWarps;
    row_ = in_slice / T::kWarpsAlongColumns * T::kWarpRows + lane / 8 * 4;
    column_ = in_slice % T::kWarpsAlongColumns * T::kWarpColumns + lane % 8 * 4;
  }

  // Adds the product over a reduction of `depth`.
  template <typename Left, typename Right>
  __device__ __forceinline__ void accumulate(Left& left, Right& right, int64_t depth) {
    if (depth > 0) {
      left.fetch(depth);
      right.fetch(depth);
    }
    for (int64_t rest = depth; rest > 0; rest -= T::kDepth) {
      left.put(shared_);
      right.put(shared_ + T::kLeftFloats);
      __syncthreads();
      if (rest > T::kDepth) {
        left.fetch(rest - T::kDepth);
        right.fetch(rest - T::kDepth);
      }
      // The same for a warp: slices past the end would add zeros.
      if (slice_ * T::kSliceDepth < rest) multiply();
      __syncthreads();
    }
  }

  __device__ __forceinline__ void add(const Product& other) {
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
#pragma unroll
      for (int j = 0; j < kPatch; ++j) sums[i][j] += other.sums[i][j];
    }
  }

  // Adds one step of the reduction to this thread's own sums, where `uses` says so: terms that must
  // not be multiplied by zero. left(row), right(column) and uses(row, column) count from the tile's
  // first.
  template <typename Left, typename Right, typename Uses>
  __device__ __forceinline__ void add_outer(const Left& left, const Right& right,
                                            const Uses& uses) {
    float along[kPatch];
#pragma unroll
    for (int j = 0; j < kPatch; ++j) along[j] = right(column(j / 4) + j % 4);
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
      const float value = left(row(i));
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        if (uses(row(i), column(j / 4) + j % 4)) sums[i][j] += value * along[j];
      }
    }
  }

  // Afterwards the first slice has the sum of all of them, in their order, and the others have
  // zeros. Every thread of the block calls it.
  __device__ __forceinline__ void add_slices() {
    if constexpr (T::kSlices > 1) {
      constexpr int kSliceThreads = T::kSliceWarps * kWarpLanes;
      constexpr int kSliceChunks = kPatch * kChunks * kSliceThreads;
      auto* buffer = reinterpret_cast<float4*>(shared_) + threadIdx.x % kSliceThreads;
      if (slice_ > 0) {
        for_each_chunk([&](int chunk, float (&v)[4]) {
          buffer[(slice_ - 1) * kSliceChunks + chunk * kSliceThreads] = {v[0], v[1], v[2], v[3]};
          v[0] = v[1] = v[2] = v[3] = 0.0f;
        });
      }
      __syncthreads();
      if (slice_ == 0) {
#pragma unroll 1
        for (int slice = 1; slice < T::kSlices; ++slice) {
          for_each_chunk([&](int chunk, float (&v)[4]) {
            const float4 other = buffer[(slice - 1) * kSliceChunks + chunk * kSliceThreads];
            v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
          });
        }
      }
      __syncthreads();
    }
  }

  // Whether this thread holds sums after add_slices; the same for a warp.
  __device__ __forceinline__ bool holds_sums() const { return slice_ == 0; }

  // C's element [i][4·chunk + j] of this thread's patch is at row(i) and column(chunk) + j of the
  // tile.
  __device__ __forceinline__ int row(int i) const { return row_ + i / 4 * 16 + i % 4; }
  __device__ __forceinline__ int column(int chunk) const { return column_ + chunk * 32; }
  float sums[kPatch][kPatch] = {};

 private:
  template <typename F>
  __device__ __forceinline__ void for_each_chunk(const F& f) {
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        f(i * kChunks + chunk, reinterpret_cast<float (&)[4]>(sums[i][4 * chunk]));
      }
    }
  }

  __device__ __forceinline__ void multiply() {
    const int first = slice_ * T::kSliceDepth;
    // Not unrolled further: loads hoisted over more of the products would take registers to spare.
#pragma unroll 1
    for (int step = 0; step < T::kSliceDepth; step += 4) {
      const int d = first + step;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float left[kPatch], right[kPatch];
        read<T::kRows, 16>(shared_, row_, d, k, left);
        read<T::kColumns, 32>(shared_ + T::kLeftFloats, column_, d, k, right);
#pragma unroll
        for (int i = 0; i < kPatch; ++i) {
#pragma unroll
          for (int j = 0; j < kPatch; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
        }
      }
    }
  }

  // Extents e … e+3, e+STEP … of depth d + k, d a multiple of four.
  template <int EXTENT, int STEP>
  __device__ __forceinline__ static void read(const float* tile, int e, int d, int k,
                                              float (&values)[kPatch]) {
    using Layout = SharedOperand<EXTENT, T::kDepth>;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int start = Layout::row_start(d + k) + Layout::chunk_start((e + chunk * STEP) / 4, d);
      const float4 four = *reinterpret_cast<const float4*>(tile + start);
      const float lanes[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) values[4 * chunk + j] = lanes[Layout::within_chunk(j, k)];
    }
  }

  float* shared_;
  int slice_, row_, column_;
};

// Whether four neighbours of a row can be one access: as its length, its start and the distance of
// the rows allow.
template <typename T>
__device__ __forceinline__ bool takes_quads(const T* data, int64_t row_length, int64_t stride) {
  return row_length % 4 == 0 && stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0;
}
template <typename T>
__device__ __forceinline__ void load_quad(const T* data, float (&values)[4]) {
  const uint2 quad = __ldcg(reinterpret_cast<const uint2*>(data));
  const float2 first = unpack_pair<T>(quad.x), second = unpack_pair<T>(quad.y);
  values[0] = first.x, values[1] = first.y, values[2] = second.x, values[3] = second.y;
}
template <>
__device__ __forceinline__ void load_quad<float>(const float* data, float (&values)[4]) {
  const float4 quad = __ldcg(reinterpret_cast<const float4*>(data));
  values[0] = quad.x, values[1] = quad.y, values[2] = quad.z, values[3] = quad.w;
}

// Elements column … column+3 of a row of `length`, as far as the row goes.
template <typename T>
__device__ __forceinline__ void load_four(const T* row, int64_t column, int64_t length, bool quads,
                                          float (&values)[4]) {
  if (quads) {
    if (column < length) load_quad(row + column, values);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (column + j < length) values[j] = to_float(row[column + j]);
  }
}
// __stcg, which is one instruction: the compiler would merge a plain vector's store with those of
// the elements one by one in the other branch.
template <typename T>
__device__ __forceinline__ void store_quad(T* data, const float (&values)[4]) {
  __stcg(reinterpret_cast<uint2*>(data),
         {pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3])});
}
template <>
__device__ __forceinline__ void store_quad<float>(float* data, const float (&values)[4]) {
  __stcg(reinterpret_cast<float4*>(data), {values[0], values[1], values[2], values[3]});
}

template <typename T>
__device__ __forceinline__ void store_four(T* row, int64_t column, int64_t length, bool quads,
                                           const float (&values)[4]) {
  if (quads) {
    if (column < length) store_quad(row + column, values);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (column + j < length) row[column + j] = from_float<T>(values[j]);
  }
}

}  // namespace fused_lora::kernels::plain
