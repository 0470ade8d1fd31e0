// out = mask ∘ (low · factor) · scale + X · W + bias + addend
//
//     X: rows×depth   W: depth×columns   low: rows×rank   factor: rank×columns
//     out and addend: rows×columns
//
// y from h, B, x, Wᵀ and b; dx from g, A, dy and W under x's mask; with a depth of zero there is no
// X and no W. X, W, bias, addend and out in T at any strides, the rows of the last two contiguous;
// low in the rank dtype, dense; factor in T or fp32, for kHalf rounded to T on
// the way. Products and sums in fp32.
//
// The two products have sums of their own: a sum that began with the low-rank product, which may be
// large beside the terms of the frozen one, would round each of these to its own magnitude. The
// low-rank product comes last, so that only its short loop has both sums in registers. The blocks
// are numbered in x, which alone admits more than 65535, the rows fastest: blocks that run at the
// same time share columns of W.
#include "kernels/plain/launch.cuh"
#include "kernels/plain/plain.h"
#include "kernels/plain/product.cuh"
#include "kernels/tile/rank_window.cuh"

namespace fused_lora::kernels {
namespace plain {
namespace {

struct LoraGemmParams {
  int64_t rows, depth, columns, rank;
  MatrixView x, weight, factor;
  const void* low;
  int64_t low_stride;
  DType low_dtype, factor_dtype;
  bool half;  // factor is rounded to T
  const void* bias;
  const RowAdapter* row_adapters;  // or null
  Dropout dropout;
  const void* addend;  // or null
  int64_t addend_stride;
  void* out;
  int64_t out_stride;
};

// Sums of kept columns times the scale, the others zero. A Philox call decides eight columns, two
// lanes' chunks: the lanes of a pair draw for every second row and exchange.
template <typename Tile>
__device__ __forceinline__ void drop(Product<Tile>& product, const Dropout& dropout,
                                     int64_t first_row, int64_t first_column) {
  const DropoutAlong<Axis::kDepth> rule(dropout);
  const int odd = static_cast<int>(threadIdx.x) & 1;
#pragma unroll
  for (int i = 0; i < Tile::kPatch; i += 2) {
#pragma unroll
    for (int chunk = 0; chunk < Product<Tile>::kChunks; ++chunk) {
      const int64_t column = first_column + product.column(chunk);
      const uint32_t drawn = rule.kept(first_row + product.row(i + odd), column / kLanes);
      const uint32_t other = __shfl_xor_sync(0xffffffffu, drawn, 1);
      const uint32_t kept[2] = {odd ? other : drawn, odd ? drawn : other};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& sum = product.sums[i + k][4 * chunk + j];
          sum = (kept[k] >> (4 * odd + j)) & 1 ? sum * dropout.scale : 0.0f;
        }
      }
    }
  }
}

// Where rows of several adapters share a tile, a row's zeros in low meet the others' part of
// factor: where that is infinite or not a number, so is their product. Then the warp sums once
// more, of each row its own ranks alone.
template <typename T, typename Tile>
__device__ __forceinline__ void contain(Product<Tile>& delta, const LoraGemmParams& p,
                                        int64_t first_row, int64_t first_column,
                                        const RankWindow& window) {
  if (__all_sync(0xffffffffu, are_numbers(delta.sums))) return;
  set_to_zero(delta.sums);
  const AdapterElements<T> low(p.low, p.low_dtype, false);
  const AdapterElements<T> factor(p.factor.data, p.factor_dtype, p.half);
#pragma unroll 1
  for (int rank = window.begin; rank < window.end; ++rank) {
    const auto uses = [&](int row, int) {
      return first_row + row < p.rows &&
             window_of_row(p.row_adapters, first_row + row, static_cast<int>(p.rank)).has(rank);
    };
    delta.add_outer(
        [&](int row) {
          return uses(row, 0) ? low.at((first_row + row) * p.low_stride + rank) : 0.0f;
        },
        [&](int column) {
          const int64_t at = first_column + column;
          const int64_t index = rank * p.factor.row_stride + at * p.factor.column_stride;
          return at < p.columns ? factor.at(index) : 0.0f;
        },
        uses);
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    lora_gemm_kernel(const LoraGemmParams p) {
  __shared__ __align__(16) float shared[Tile::kSharedFloats];
  const int64_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows;
  const int64_t row = blockIdx.x % row_tiles * Tile::kRows;
  const int64_t column = blockIdx.x / row_tiles * Tile::kColumns;

  Product<Tile> product(shared);
  {
    Operand<Tile::kRows, Tile::kDepth, Elements<T>> x(
        Elements<T>(p.x.data), {p.x.row_stride, p.x.column_stride, row, p.rows - row, 0});
    Operand<Tile::kColumns, Tile::kDepth, Elements<T>> weight(
        Elements<T>(p.weight.data),
        {p.weight.column_stride, p.weight.row_stride, column, p.columns - column, 0});
    product.accumulate(x, weight, p.depth);
  }
  {
    const RankWindow window = window_of_rows(
        p.row_adapters, row, static_cast<int>(min(static_cast<int64_t>(Tile::kRows), p.rows - row)),
        {0, static_cast<int>(p.rank)});
    Operand<Tile::kRows, Tile::kDepth, AdapterElements<T>> low(
        AdapterElements<T>(p.low, p.low_dtype, false),
        {p.low_stride, 1, row, p.rows - row, window.begin});
    Operand<Tile::kColumns, Tile::kDepth, AdapterElements<T>> factor(
        AdapterElements<T>(p.factor.data, p.factor_dtype, p.half),
        {p.factor.column_stride, p.factor.row_stride, column, p.columns - column, window.begin});
    Product<Tile> delta(shared);
    delta.accumulate(low, factor, window.size());
    if (p.row_adapters != nullptr || p.dropout.active()) {
      delta.add_slices();
      if (p.row_adapters != nullptr && delta.holds_sums())
        contain<T>(delta, p, row, column, window);
      if (p.dropout.active() && delta.holds_sums()) drop(delta, p.dropout, row, column);
    }
    product.add(delta);
  }
  product.add_slices();
  if (!product.holds_sums()) return;

  auto* out = static_cast<T*>(p.out);
  const auto* bias = static_cast<const T*>(p.bias);
  const auto* addend = static_cast<const T*>(p.addend);
  const bool quads = takes_quads(out, p.columns, p.out_stride);
  const bool addend_quads = takes_quads(addend, p.columns, p.addend_stride);
#pragma unroll
  for (int chunk = 0; chunk < Product<Tile>::kChunks; ++chunk) {
    const int64_t first = column + product.column(chunk);
    float added[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      added[j] = bias != nullptr && first + j < p.columns ? to_float(bias[first + j]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Tile::kPatch; ++i) {
      const int64_t at = row + product.row(i);
      const float* sums = product.sums[i] + 4 * chunk;
      if (at >= p.rows) continue;
      float values[4] = {};
      if (addend != nullptr) {
        load_four(addend + at * p.addend_stride, first, p.columns, addend_quads, values);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] += sums[j] + added[j];
      store_four(out + at * p.out_stride, first, p.columns, quads, values);
    }
  }
}

template <typename T, typename Tile>
cudaError_t launch(const LoraGemm& stage, cudaStream_t stream) {
  const LoraGemmParams params = {stage.rows,
                                 stage.depth,
                                 stage.columns,
                                 stage.rank,
                                 stage.x,
                                 stage.weight,
                                 stage.factor,
                                 stage.low,
                                 stride_or_dense(stage.low_stride, stage.rank),
                                 rank_dtype(stage.arithmetic, stage.dtype),
                                 stage.factor_dtype,
                                 stage.arithmetic == Arithmetic::kHalf,
                                 stage.bias,
                                 stage.row_adapters,
                                 stage.dropout,
                                 stage.addend,
                                 stage.addend_stride,
                                 stage.out,
                                 stage.out_stride};
  const auto blocks = static_cast<unsigned>(tiles<Tile>(stage.rows, stage.columns));
  lora_gemm_kernel<T, Tile><<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace
}  // namespace plain

cudaError_t launch_plain_lora_gemm(const LoraGemm& stage, cudaStream_t stream) {
  using namespace plain;
  const int64_t rows = stage.rows, columns = stage.columns;
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_type(stage.dtype, [&](auto type) {
    using T = decltype(type);
    if (tiles<WideTile>(rows, columns) >= kManyBlocks) return launch<T, WideTile>(stage, stream);
    if (rows > LowTile::kRows && tiles<SquareTile>(rows, columns) >= kManyBlocks) {
      return launch<T, SquareTile>(stage, stream);
    }
    return launch<T, LowTile>(stage, stream);
  });
}

}  // namespace fused_lora::kernels
