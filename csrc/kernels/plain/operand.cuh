// Operands of the plain kernels: elements in global memory at any strides, on their way to a tile
// in shared memory. A fetch takes elements as they are into registers while the block computes on
// the tile before; a put converts them to fp32, drops those that dropout drops, and writes the
// tile.
#pragma once

#include "kernels/element.h"
#include "kernels/plain/tile.cuh"
#include "kernels/tile/dropout.cuh"

namespace fused_lora::kernels::plain {

template <typename T>
struct BitsOf {
  using Type = uint16_t;
};
template <>
struct BitsOf<float> {
  using Type = uint32_t;
};

// An array of T. Elements travel as bits, of which zero is 0.0.
template <typename T>
struct Elements {
  using Bits = typename BitsOf<T>::Type;
  const void* data;

  __device__ __forceinline__ explicit Elements(const void* data) : data(data) {}
  __device__ __forceinline__ int64_t bytes() const { return sizeof(Bits); }
  __device__ __forceinline__ Bits load(const char* at) const {
    return *reinterpret_cast<const Bits*>(at);
  }
  __device__ __forceinline__ float convert(Bits bits) const {
    return to_float(reinterpret_cast<const T&>(bits));
  }
  __device__ __forceinline__ float at(int64_t index) const {
    return convert(load(static_cast<const char*>(data) + index * bytes()));
  }
};

// An array of T or, as its dtype says, of fp32, which is rounded to T where `rounds` says so.
template <typename T>
struct AdapterElements {
  using Bits = uint32_t;
  const void* data;
  bool is_float;
  bool rounds;

  __device__ __forceinline__ AdapterElements(const void* data, DType dtype, bool rounds)
      : data(data), is_float(dtype == DType::kFloat32), rounds(rounds) {}
  __device__ __forceinline__ int64_t bytes() const { return is_float ? 4 : sizeof(T); }
  __device__ __forceinline__ Bits load(const char* at) const {
    return is_float ? *reinterpret_cast<const uint32_t*>(at)
                    : *reinterpret_cast<const typename BitsOf<T>::Type*>(at);
  }
  __device__ __forceinline__ float convert(Bits bits) const {
    if (!is_float) {
      const auto narrow = static_cast<typename BitsOf<T>::Type>(bits);
      return to_float(reinterpret_cast<const T&>(narrow));
    }
    const float value = __uint_as_float(bits);
    return rounds ? to_float(from_float<T>(value)) : value;
  }
  __device__ __forceinline__ float at(int64_t index) const {
    return convert(load(static_cast<const char*>(data) + index * bytes()));
  }
};

enum class Axis { kExtent, kDepth };

// What dropout does to x, whose columns lie along one axis of the tile.
struct NoDropout {
  static constexpr bool kPossible = false;
};
template <Axis COLUMNS>
struct DropoutAlong {
  static constexpr bool kPossible = true;
  static constexpr Axis kColumns = COLUMNS;
  DropoutKey key;
  bool active;

  __device__ __forceinline__ explicit DropoutAlong(const Dropout& dropout)
      : key(dropout_key(dropout)), active(dropout.active()) {}
  // Bit i is set where column 8·block + i of the row is kept, block counted from x's first.
  __device__ __forceinline__ uint32_t kept(int64_t row, int64_t block) const {
    const Philox4x32 words = key.words(row, key.block_of(block * kLanes));
    uint32_t bits = 0;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      bits |= (dropout_lane(words, lane) < key.keep ? 1u : 0u) << lane;
    }
    return bits;
  }
};

// The part of an operand that a block reads: `extents` rows or columns of C from `first_extent` on,
// and the whole reduction from `first_depth` on. Element (e, d) lies at e · extent_stride + d ·
// depth_stride.
struct Region {
  int64_t extent_stride, depth_stride;
  int64_t first_extent, extents;
  int64_t first_depth;
};

// EXTENT×DEPTH elements at a time, kCount of them a thread. Neighbouring threads take neighbours
// along the fast axis, the one that is contiguous in memory, and a thread takes kCount neighbours
// along the other, the slow one.
template <int EXTENT, int DEPTH, typename Source, typename Drop = NoDropout>
class Operand {
 public:
  __device__ __forceinline__ Operand(const Source& source, const Region& region,
                                     const Drop& drop = {})
      : source_(source), drop_(drop) {
    depth_is_fast_ = region.depth_stride == 1 ||
                     (region.extent_stride != 1 && region.depth_stride < region.extent_stride);
    const int width = depth_is_fast_ ? DEPTH : EXTENT;
    fast_ = static_cast<int>(threadIdx.x) % width;
    slow_ = static_cast<int>(threadIdx.x) / width * kCount;
    first_extent_ = region.first_extent;
    extent_limit_ = static_cast<int>(min(region.extents, static_cast<int64_t>(EXTENT)));
    depth_ = region.first_depth;
    const int64_t bytes = source.bytes();
    slow_step_ = (depth_is_fast_ ? region.extent_stride : region.depth_stride) * bytes;
    tile_step_ = DEPTH * region.depth_stride * bytes;
    const int e = depth_is_fast_ ? slow_ : fast_, d = depth_is_fast_ ? fast_ : slow_;
    at_ =
        static_cast<const char*>(source.data) + ((region.first_extent + e) * region.extent_stride +
                                                 (region.first_depth + d) * region.depth_stride) *
                                                    bytes;
  }

  // The next tile, of which `left` of the reduction remain; zeros outside.
  __device__ __forceinline__ void fetch(int64_t left) {
    const int depth_limit = static_cast<int>(min(left, static_cast<int64_t>(DEPTH)));
    const bool inside = fast_ < (depth_is_fast_ ? depth_limit : extent_limit_);
    const int count = inside ? (depth_is_fast_ ? extent_limit_ : depth_limit) - slow_ : 0;
    const char* at = at_;
    if (count >= kCount) {
#pragma unroll
      for (int i = 0; i < kCount; ++i, at += slow_step_) bits_[i] = source_.load(at);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i, at += slow_step_)
        bits_[i] = i < count ? source_.load(at) : 0;
    }
    if constexpr (Drop::kPossible) {
      if (drop_.active) draw();
    }
    at_ += tile_step_;
    depth_ += DEPTH;
  }

  __device__ __forceinline__ void put(float* tile) const {
    using Layout = SharedOperand<EXTENT, DEPTH>;
    if (depth_is_fast_) {
      tile += Layout::row_start(fast_);
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        float* chunk = tile + Layout::chunk_start((slow_ + i) / 4, fast_);
#pragma unroll
        for (int j = 0; j < 4; ++j) chunk[Layout::within_chunk(j, fast_)] = value(i + j);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        float* chunk = tile + Layout::chunk_start(fast_ / 4, slow_ + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          chunk[Layout::row_start(slow_ + i + j) + Layout::within_chunk(fast_, j)] = value(i + j);
        }
      }
    }
  }

 private:
  static constexpr int kCount = EXTENT * DEPTH / kThreads;
  static_assert(kCount * kThreads == EXTENT * DEPTH, "threads share a tile evenly");
  static_assert(kCount % 4 == 0, "a thread's elements are chunks along the slow axis");
  static_assert(kThreads % EXTENT == 0 && kThreads % DEPTH == 0,
                "a thread has one fast coordinate");

  __device__ __forceinline__ float value(int i) const {
    const float value = source_.convert(bits_[i]);
    if constexpr (Drop::kPossible) return (kept_ >> i) & 1 ? value : 0.0f;
    return value;
  }

  // Sets bit i of kept_ where element i is kept. One Philox call decides eight neighbours along x's
  // columns. Where these are the slow axis they are a thread's own eight elements. Else they are
  // the i-th elements of eight neighbouring lanes: lane l draws for element l / 4 of the lanes 8 ·
  // (l % 4) and on, and every lane fetches its bits.
  __device__ __forceinline__ void draw() {
    static_assert(kCount == kLanes, "a warp's lanes draw for all of its elements");
    if (depth_is_fast_ != (Drop::kColumns == Axis::kDepth)) {
      kept_ = drawn(fast_, slow_);
      return;
    }
    const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
    const int thread = static_cast<int>(threadIdx.x) - lane + lane % 4 * kLanes;
    const int width = depth_is_fast_ ? DEPTH : EXTENT;
    const uint32_t bits = drawn(thread % width, thread / width * kCount + lane / 4);
    kept_ = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t group = __shfl_sync(0xffffffffu, bits, 4 * i + lane / kLanes);
      kept_ |= ((group >> (lane % kLanes)) & 1) << i;
    }
  }
  __device__ __forceinline__ uint32_t drawn(int fast, int slow) const {
    const int64_t extent = first_extent_ + (depth_is_fast_ ? slow : fast);
    const int64_t depth = depth_ + (depth_is_fast_ ? fast : slow);
    return Drop::kColumns == Axis::kDepth ? drop_.kept(extent, depth / kLanes)
                                          : drop_.kept(depth, extent / kLanes);
  }

  Source source_;
  Drop drop_;
  bool depth_is_fast_;
  int fast_, slow_;  // of the thread's first element in the tile
  int64_t first_extent_;
  int extent_limit_;
  int64_t depth_;                  // of the tile's first element
  const char* at_;                 // the thread's first element
  int64_t slow_step_, tile_step_;  // bytes to its next one, and to the next tile's
  typename Source::Bits bits_[kCount];
  uint32_t kept_ = ~0u;
};

}  // namespace fused_lora::kernels::plain
