// From the sums of a block's warps to out and packed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/element.h"
#include "kernels/ptx/shared_address.cuh"
#include "kernels/ptx/shared_memory.cuh"
#include "kernels/rank_down/traits.cuh"

namespace fused_lora::kernels {

// Offset, in numbers, of four ranks of a row among a warp's sums. A warp writes pairs of ranks of
// four rows at once, and reads the quads of a row: chunks are permuted in pairs, as in FactorTile.
template <int kRanks>
__device__ __forceinline__ int sums_offset(int row, int quad) {
  const int permutation = kRanks == 16 ? row & 2 : (row & 3) << 1;
  return row * kRanks + (quad ^ permutation) * 4;
}

template <typename Traits>
__device__ __forceinline__ void write_sums(unsigned char* target, const Accumulators<Traits>& sums,
                                           int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < Traits::kRowFragments; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kRankFragments; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int offset =
            sums_offset<Traits::kRanks>(16 * m + 8 * h + g, 2 * n + t / 2) + 2 * (t % 2);
        ptx::store_shared_64(ptx::shared_address(target) + offset * 4,
                             __float_as_uint(sums[m][n][2 * h]),
                             __float_as_uint(sums[m][n][2 * h + 1]));
      }
    }
  }
}

// `count` numbers, or four at once where `whole`.
template <typename Element>
__device__ __forceinline__ void store_quad(Element* target, const Element (&value)[4], int count,
                                           bool whole) {
  if (whole) {
    using Quad = std::conditional_t<sizeof(Element) == 4, uint4, uint2>;
    Quad quad;
    if constexpr (sizeof(Element) == 4) {
      quad = {__float_as_uint(value[0]), __float_as_uint(value[1]), __float_as_uint(value[2]),
              __float_as_uint(value[3])};
    } else {
      const auto bits = [&](int i) {
        return static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(value[i]));
      };
      quad = {bits(0) | bits(1) << 16, bits(2) | bits(3) << 16};
    }
    *reinterpret_cast<Quad*>(target) = quad;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) target[i] = value[i];
  }
}

// Adds the warps' sums and writes `rows` rows of out and packed. Zeros where a row does not
// use a rank: selected, because a sum may be infinite there.
template <typename Traits>
__device__ __forceinline__ void finish(const RankDownMember& p, const unsigned char* shared,
                                       int64_t first_row, int rows, int first_rank) {
  using Out = typename Traits::Out;
  using Packed = typename Traits::Packed;
  constexpr int kParts = kPackedParts<Traits::kArithmetic>;
  constexpr int kQuads = Traits::kRanks / 4;
  Out* const out = static_cast<Out*>(p.out);
  Packed* const packed = static_cast<Packed*>(p.packed);

  for (int i = threadIdx.x; i < rows * kQuads; i += Traits::kThreads) {
    const int row = i / kQuads, quad = i % kQuads;
    const int rank = first_rank + 4 * quad, count = p.rank - rank;
    if (count <= 0) continue;
    float sum[4] = {};
#pragma unroll
    for (int warp = 0; warp < Traits::kWarps; ++warp) {
      const float* sums = reinterpret_cast<const float*>(shared + warp * Traits::kWarpBytes);
      const float4 part =
          *reinterpret_cast<const float4*>(sums + sums_offset<Traits::kRanks>(row, quad));
      sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
    }
    const RankWindow window = window_of_row(p.row_adapters, first_row + row, p.rank);
    const float alpha = p.alpha * scaling_of_row(p.row_adapters, first_row + row);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] = window.has(rank + j) ? alpha * sum[j] : 0.0f;
    if (out != nullptr) {
      const Out value[4] = {from_float<Out>(sum[0]), from_float<Out>(sum[1]),
                            from_float<Out>(sum[2]), from_float<Out>(sum[3])};
      store_quad(out + (first_row + row) * p.out_stride + rank, value, count, p.store_quads);
    }
    if (packed != nullptr) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Packed value[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) value[j] = packed_part<Packed>(sum[j], part, PackedSide::kLow);
        store_quad(packed + (first_row + row) * p.packed_rank + part * p.rank + rank, value, count,
                   p.store_quads);
      }
    }
  }

  if (packed == nullptr || first_rank + Traits::kRanks < p.rank) return;
  const int depth = kParts * p.rank;
  const int quads = (p.packed_rank - depth + 3) / 4;
  const Packed zero = from_float<Packed>(0.0f);
  for (int i = threadIdx.x; i < rows * quads; i += Traits::kThreads) {
    const int row = i / quads, position = depth + i % quads * 4;
    store_quad(packed + (first_row + row) * p.packed_rank + position, {zero, zero, zero, zero},
               p.packed_rank - position, p.store_quads);
  }
}

}  // namespace fused_lora::kernels
