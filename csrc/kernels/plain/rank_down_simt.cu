// out = alpha · drop(X) · F        X: rows×columns   F: columns×rank   out: rows×rank
//
// h from x and Aᵀ, g from dy and B, at any strides; X in T, F in T or fp32, fp32 products and sums.
// For kHalf F is rounded to T on the way and out is in T, else out is fp32.
//
// A block computes a tile of out over the whole reduction. The blocks are numbered in x, which
// alone admits more than 65535, the rows fastest.
#include "kernels/plain/launch.cuh"
#include "kernels/plain/plain.h"
#include "kernels/plain/product.cuh"
#include "kernels/tile/rank_window.cuh"

namespace fused_lora::kernels {
namespace plain {
namespace {

template <typename T>
struct RankDownParams {
  int64_t rows, columns, rank;
  MatrixView x, factor;
  DType factor_dtype;
  bool half;  // F is rounded to T, and out is in T
  float alpha;
  const RowAdapter* row_adapters;  // or null
  Dropout dropout;
  void* out;
  int64_t out_stride;
};

// Zeros where a row does not use a rank: selected, because a sum may be infinite there.
template <typename Out, typename T, typename Tile>
__device__ __forceinline__ void store(const Product<Tile>& product, Out* out,
                                      const RankDownParams<T>& p, int64_t first_row,
                                      int64_t first_rank) {
  const bool quads = takes_quads(out, p.rank, p.out_stride);
#pragma unroll
  for (int i = 0; i < Tile::kPatch; ++i) {
    const int64_t row = first_row + product.row(i);
    if (row >= p.rows) continue;
    const RankWindow window = window_of_row(p.row_adapters, row, static_cast<int>(p.rank));
    const float alpha = p.alpha * scaling_of_row(p.row_adapters, row);
#pragma unroll
    for (int chunk = 0; chunk < Product<Tile>::kChunks; ++chunk) {
      const int64_t rank = first_rank + product.column(chunk);
      float values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool uses = window.has(static_cast<int>(rank) + j);
        values[j] = uses ? alpha * product.sums[i][4 * chunk + j] : 0.0f;
      }
      store_four(out + row * p.out_stride, rank, p.rank, quads, values);
    }
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    rank_down_kernel(const RankDownParams<T> p) {
  __shared__ __align__(16) float shared[Tile::kSharedFloats];
  const int64_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows;
  const int64_t row = blockIdx.x % row_tiles * Tile::kRows;
  const int64_t column = blockIdx.x / row_tiles * Tile::kColumns;

  Operand<Tile::kRows, Tile::kDepth, Elements<T>, DropoutAlong<Axis::kDepth>> x(
      Elements<T>(p.x.data), {p.x.row_stride, p.x.column_stride, row, p.rows - row, 0},
      DropoutAlong<Axis::kDepth>(p.dropout));
  Operand<Tile::kColumns, Tile::kDepth, AdapterElements<T>> factor(
      AdapterElements<T>(p.factor.data, p.factor_dtype, p.half),
      {p.factor.column_stride, p.factor.row_stride, column, p.rank - column, 0});
  Product<Tile> product(shared);
  const RankWindow ranks = {static_cast<int>(column),
                            static_cast<int>(min(column + Tile::kColumns, p.rank))};
  const RankWindow window =
      window_of_rows(p.row_adapters, row,
                     static_cast<int>(min(static_cast<int64_t>(Tile::kRows), p.rows - row)), ranks);
  product.accumulate(x, factor, window.empty() ? 0 : p.columns);
  product.add_slices();
  if (!product.holds_sums()) return;
  if (p.half) {
    store(product, static_cast<T*>(p.out), p, row, column);
  } else {
    store(product, static_cast<float*>(p.out), p, row, column);
  }
}

template <typename T, typename Tile>
cudaError_t launch(const RankDown& stage, cudaStream_t stream) {
  const RankDownParams<T> params = {stage.rows,
                                    stage.columns,
                                    stage.rank,
                                    stage.x,
                                    stage.factor,
                                    stage.factor_dtype,
                                    stage.arithmetic == Arithmetic::kHalf,
                                    stage.alpha,
                                    stage.row_adapters,
                                    stage.dropout,
                                    stage.out,
                                    stride_or_dense(stage.out_stride, stage.rank)};
  const auto blocks = static_cast<unsigned>(tiles<Tile>(stage.rows, stage.rank));
  rank_down_kernel<T, Tile><<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace
}  // namespace plain

cudaError_t launch_plain_rank_down(const RankDown& stage, cudaStream_t stream) {
  using namespace plain;
  if (stage.rows == 0 || stage.rank == 0) return cudaSuccess;
  return with_type(stage.dtype, [&](auto type) {
    using T = decltype(type);
    if (tiles<NarrowTile>(stage.rows, 1) < kManyBlocks)
      return launch<T, LowDeepTile>(stage, stream);
    if (stage.rank <= NarrowTile::kColumns) return launch<T, NarrowTile>(stage, stream);
    return launch<T, SquareTile>(stage, stream);
  });
}

}  // namespace fused_lora::kernels
