// Packing of lora_gemm's low-rank operands; stages.h states the format.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/element.h"
#include "kernels/stages.h"

namespace fused_lora::kernels {

// The element that a packed operand is made of.
template <typename T, Arithmetic kArithmetic>
using PackedElement = std::conditional_t<kArithmetic == Arithmetic::kHalfMasters, bf16, T>;

// [high | high | low] beside X, [high | low | high] beside the weight; else the number alone.
template <Arithmetic kArithmetic>
constexpr int kPackedParts = packed_parts(kArithmetic);

enum class PackedSide { kLow, kFactor };

// What `part` of a packed operand holds of a number.
template <typename Packed>
__device__ __forceinline__ Packed packed_part(float value, int part, PackedSide side) {
  const Packed high = from_float<Packed>(value);
  const int low_part = side == PackedSide::kLow ? 2 : 1;
  return part == low_part ? from_float<Packed>(value - to_float(high)) : high;
}

// PackFactor as the kernel reads it.
struct PackFactorParams {
  MatrixView factor;
  DType factor_dtype;
  int64_t extent;
  int rank, packed_rank;
  bool depth_contiguous;
  int64_t stride;
  void* packed;
  int64_t blocks;  // 0: nothing to do
};

constexpr int kPackExtent = 64, kPackRanks = 64;
// Odd: the rows and the columns of a whole tile fall on different banks.
constexpr int kPackPitch = kPackRanks + 1;
constexpr int kPackBytes = kPackExtent * kPackPitch * static_cast<int>(sizeof(float));

// One block's tile of kPackExtent × kPackRanks, by way of shared memory: it is read along the
// factor's contiguous dimension and written along packed's. Where these are the same the tile is
// dense in that order, else it has a pitch that serves both.
template <typename T, Arithmetic kArithmetic, int kThreads>
__device__ __forceinline__ void pack_factor(const PackFactorParams& p, int64_t block,
                                            float* shared) {
  using Packed = PackedElement<T, kArithmetic>;
  const int rank_tiles = (p.rank + kPackRanks - 1) / kPackRanks;
  const int64_t first_e = block / rank_tiles * kPackExtent;
  const int first_j = static_cast<int>(block % rank_tiles) * kPackRanks;
  const int extent = static_cast<int>(min(static_cast<int64_t>(kPackExtent), p.extent - first_e));
  const int ranks = min(kPackRanks, p.rank - first_j);

  const bool rank_first = p.factor.column_stride == 1;
  const int inner = rank_first ? ranks : extent;
  const bool transposes = rank_first != p.depth_contiguous;
  const int e_pitch = transposes ? kPackPitch : rank_first ? ranks : 1;
  const int j_pitch = transposes || rank_first ? 1 : extent;
  for (int i = threadIdx.x; i < extent * ranks; i += kThreads) {
    const int outer = i / inner, rest = i % inner;
    const int e = rank_first ? outer : rest, j = rank_first ? rest : outer;
    const int64_t index =
        (first_e + e) * p.factor.row_stride + (first_j + j) * p.factor.column_stride;
    shared[e * e_pitch + j * j_pitch] = load_as_float(p.factor.data, p.factor_dtype, index);
  }
  __syncthreads();

  Packed* packed = static_cast<Packed*>(p.packed);
  const int64_t e_stride = p.depth_contiguous ? p.packed_rank : 1;
  const int64_t depth_stride = p.depth_contiguous ? 1 : p.stride;
  packed += first_e * e_stride;
  // depths positions from `first` on, for each of the tile's rows, in packed's own order.
  const auto write = [&](int first, int depths, auto value) {
    const int width = p.depth_contiguous ? depths : extent;
    for (int i = threadIdx.x; i < extent * depths; i += kThreads) {
      const int outer = i / width, rest = i % width;
      const int e = p.depth_contiguous ? outer : rest, d = p.depth_contiguous ? rest : outer;
      packed[e * e_stride + (first + d) * depth_stride] = value(e, d);
    }
  };
  for (int part = 0; part < kPackedParts<kArithmetic>; ++part) {
    write(part * p.rank + first_j, ranks, [&](int e, int j) {
      return packed_part<Packed>(shared[e * e_pitch + j * j_pitch], part, PackedSide::kFactor);
    });
  }
  if (first_j + ranks == p.rank) {
    const int depth = kPackedParts<kArithmetic> * p.rank;
    write(depth, p.packed_rank - depth, [](int, int) { return from_float<Packed>(0.0f); });
  }
}

}  // namespace fused_lora::kernels
