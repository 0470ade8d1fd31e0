// out[c][j] = alpha · Σ_m drop(X)[m][c] · low[m][j]        X: rows×columns   low: rows×rank
//
// dB (columns×rank) from dy and h; dA, written transposed (rank×columns), from x and g. X in T at
// any strides, low in the rank dtype; fp32 products and sums.
//
// A block computes a tile of out over one share of the rows. Blocks in x: tiles, columns fastest;
// in y: shares; in z: stages, of which the smaller has blocks without work. Shares are whole tiles
// of rows, equal but for the last ones. One share alone goes to out in its dtype; of several, each
// writes its fp32 sums, zeros where it has no rows.
#include <algorithm>

#include "kernels/plain/launch.cuh"
#include "kernels/plain/plain.h"
#include "kernels/plain/product.cuh"
#include "kernels/tile/rank_window.cuh"

namespace fused_lora::kernels {
namespace plain {
namespace {

struct RankGradStage {
  int64_t rows, columns, rank;
  MatrixView x;
  const void* low;
  int64_t low_stride;
  DType low_dtype;
  float alpha;
  const RowAdapter* row_adapters;  // or null
  Dropout dropout;
  bool transposed;
  int splits;
  float* partials;
  void* out;
  DType out_dtype;
};
struct RankGradParams {
  RankGradStage stages[kMostGrads];
};

// Chunks of four along a row of out: a row of the patch, or where out is transposed a column.
template <typename Out, typename Tile>
__device__ __forceinline__ void store(const Product<Tile>& product, Out* out,
                                      const RankGradStage& stage, int64_t first_column,
                                      int64_t first_rank) {
  const int64_t length = stage.transposed ? stage.columns : stage.rank;
  const bool quads = takes_quads(out, length, length);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[j] = stage.alpha * (stage.transposed ? product.sums[j][i] : product.sums[i][j]);
    }
    const int64_t column = first_column + product.row(stage.transposed ? 0 : i);
    const int64_t rank = first_rank + product.column(0) + (stage.transposed ? i : 0);
    if (stage.transposed) {
      if (rank < stage.rank) store_four(out + rank * length, column, length, quads, values);
    } else {
      if (column < stage.columns) store_four(out + column * length, rank, length, quads, values);
    }
  }
}

// A sum that is not a number may have been made so by a row that does not use its rank, whose zero
// in low met what X holds there. Then the warp sums once more, the rows that use a rank alone.
template <typename T, typename Tile>
__device__ __forceinline__ void contain(Product<Tile>& product, const RankGradStage& stage,
                                        int64_t first_column, int64_t first_rank, int64_t first_row,
                                        int64_t rows) {
  if (__all_sync(0xffffffffu, are_numbers(product.sums))) return;
  set_to_zero(product.sums);
  const Elements<T> x(stage.x.data);
  const AdapterElements<T> low(stage.low, stage.low_dtype, false);
  const DropoutAlong<Axis::kExtent> drop(stage.dropout);
#pragma unroll 1
  for (int64_t row = first_row; row < first_row + rows; ++row) {
    const RankWindow window = window_of_row(stage.row_adapters, row, static_cast<int>(stage.rank));
    if (!window.overlaps(static_cast<int>(first_rank), Tile::kColumns)) continue;
    const auto uses = [&](int, int rank) {
      return window.has(static_cast<int>(first_rank) + rank);
    };
    product.add_outer(
        [&](int column) {
          const int64_t at = first_column + column;
          if (at >= stage.columns) return 0.0f;
          if (drop.active && !(drop.kept(row, at / kLanes) >> (at % kLanes) & 1)) return 0.0f;
          return x.at(row * stage.x.row_stride + at * stage.x.column_stride);
        },
        [&](int rank) {
          return uses(0, rank) ? low.at(row * stage.low_stride + first_rank + rank) : 0.0f;
        },
        uses);
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    rank_grad_kernel(const RankGradParams p) {
  static_assert(Tile::kPatch == 4, "store writes patches of one chunk");
  __shared__ __align__(16) float shared[Tile::kSharedFloats];
  const RankGradStage& stage = p.stages[blockIdx.z];
  const int64_t column_tiles = (stage.columns + Tile::kRows - 1) / Tile::kRows;
  const int64_t column = blockIdx.x % column_tiles * Tile::kRows;
  const int64_t rank = blockIdx.x / column_tiles * Tile::kColumns;
  if (rank >= stage.rank || blockIdx.y >= stage.splits) return;

  const int64_t row_tiles = (stage.rows + Tile::kDepth - 1) / Tile::kDepth;
  const int64_t share = (row_tiles + stage.splits - 1) / stage.splits * Tile::kDepth;
  const int64_t row = blockIdx.y * share;
  const int64_t rows = min(share, stage.rows - row);

  Operand<Tile::kRows, Tile::kDepth, Elements<T>, DropoutAlong<Axis::kExtent>> x(
      Elements<T>(stage.x.data),
      {stage.x.column_stride, stage.x.row_stride, column, stage.columns - column, row},
      DropoutAlong<Axis::kExtent>(stage.dropout));
  Operand<Tile::kColumns, Tile::kDepth, AdapterElements<T>> low(
      AdapterElements<T>(stage.low, stage.low_dtype, false),
      {1, stage.low_stride, rank, stage.rank - rank, row});
  Product<Tile> product(shared);
  product.accumulate(x, low, rows);
  product.add_slices();
  if (!product.holds_sums()) return;
  if (stage.row_adapters != nullptr) contain<T>(product, stage, column, rank, row, rows);
  if (stage.splits > 1) {
    store(product, stage.partials + blockIdx.y * stage.columns * stage.rank, stage, column, rank);
  } else if (stage.out_dtype == DType::kFloat32) {
    store(product, static_cast<float*>(stage.out), stage, column, rank);
  } else {
    store(product, static_cast<T*>(stage.out), stage, column, rank);
  }
}

template <typename Tile>
int64_t tiles_of(const RankGrad& stage) {
  return tiles<Tile>(stage.columns, stage.rank);
}

template <typename T, typename Tile>
cudaError_t launch(const RankGrad* stages, int count, cudaStream_t stream) {
  RankGradParams params = {};
  int64_t blocks = 0;
  int splits = 0;
  for (int i = 0; i < count; ++i) {
    const RankGrad& s = stages[i];
    params.stages[i] = {s.rows,
                        s.columns,
                        s.rank,
                        s.x,
                        s.low,
                        stride_or_dense(s.low_stride, s.rank),
                        rank_dtype(s.arithmetic, s.dtype),
                        s.alpha,
                        s.row_adapters,
                        s.dropout,
                        s.transposed,
                        s.splits,
                        s.partials,
                        s.out,
                        s.out_dtype};
    blocks = std::max(blocks, tiles_of<Tile>(s));
    splits = std::max(splits, s.splits);
  }
  if (blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks), splits, count);
  rank_grad_kernel<T, Tile><<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace
}  // namespace plain

int plain_rank_grad_splits(const RankGrad& stage, const Device& device) {
  using namespace plain;
  // Two blocks on each multiprocessor, so that one loads while the other computes.
  constexpr int64_t kBlocksPerMultiprocessor = 2;
  // A share reads as many rows as to make its partial sums, written and read in fp32, the smaller
  // part of its traffic; and enough tiles of 32 for its loads to overlap.
  constexpr int64_t kLeastTiles = 4;
  const int64_t row_tiles = ceil_div(stage.rows, NarrowTile::kDepth);
  const int64_t output_tiles =
      std::max<int64_t>(1, stage.rank <= NarrowTile::kColumns ? tiles_of<NarrowTile>(stage)
                                                              : tiles_of<SquareTile>(stage));
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * device.multiprocessors, output_tiles);
  const int64_t least = std::max(kLeastTiles, ceil_div(4 * stage.rank, NarrowTile::kDepth));
  const int64_t splits = std::clamp<int64_t>(std::min(wanted, row_tiles / least), 1, 65535);
  if (splits == 1) return 1;
  // No share without rows: equal shares of whole tiles may be fewer.
  return static_cast<int>(ceil_div(row_tiles, ceil_div(row_tiles, splits)));
}

cudaError_t launch_plain_rank_grad(const RankGrad* stages, int count, cudaStream_t stream) {
  using namespace plain;
  if (count == 0) return cudaSuccess;
  return with_type(stages[0].dtype, [&](auto type) {
    using T = decltype(type);
    int64_t rank = 0;
    for (int i = 0; i < count; ++i) rank = std::max(rank, stages[i].rank);
    if (rank <= NarrowTile::kColumns) return launch<T, NarrowTile>(stages, count, stream);
    return launch<T, SquareTile>(stages, count, stream);
  });
}

}  // namespace fused_lora::kernels
