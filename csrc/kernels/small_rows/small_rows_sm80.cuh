// y of few rows (decoding, short batches) in one launch, sm_80 and newer:
//
//     y = X Wᵀ + b + h Bᵀ,   h = s · X Aᵀ        X: M×K   W: N×K   A: r×K   B: N×r   M ≤ 64
//
// Such a call is bound by reading W once, and every CTA reads all of X for its own columns of W. So
// it makes h as well: beside the four warps that multiply X's tile by 64 rows of W, one warp for
// each 16 ranks multiplies the same tile, already in shared memory, by A. A is read by every CTA,
// from L2 but for the first; small_rows_obstacle bounds its bytes by those of a CTA's own part of
// W, so that they hide under them. The CTA then adds h · Bᵀ for its columns to the same
// accumulators, in tiles that it packs for itself as the launch before lora_gemm does for many rows
// (tile/pack.cuh).
//
// Where rows have adapters of their own (row_adapters), A and B are read from the first to the last
// rank that the CTA's rows use, and packed as though there were no others.
//
// With dropout each CTA would draw the whole mask of x again: then two launches serve.
//
// Layouts. X: rows, depth contiguous. W: N×K, or K×N (Conv1D). A: depth contiguous, 16-byte rows.
// B: any.
//
// Shared memory, at most 48 KiB:
//
//     main loop   3 to 6 stages × (X 32 × 64 bytes, W 64 × 64 bytes, A a rank warp: 16 ranks × 64
//                 bytes, 128 in fp32)
//     low rank    up to four tiles of 6 KiB as lora_gemm lays them out, and h in fp32, 32 × ranks
//     epilogue    as lora_gemm's
#pragma once

#include <algorithm>

#include "kernels/lora_gemm/epilogue.cuh"
#include "kernels/lora_gemm/one_rank.cuh"
#include "kernels/ptx/shared_address.cuh"
#include "kernels/rank_down/products.cuh"
#include "kernels/small_rows/params.h"
#include "kernels/tile/pack.cuh"

namespace fused_lora::kernels::small_rows {

// A rank warp's product: X's tile, all of its rows, by 16 ranks of A.
template <typename T_, Arithmetic kArithmetic_, typename Factor_, int kRows>
struct RankWarp {
  using T = T_;
  using Factor = Factor_;
  static constexpr Arithmetic kArithmetic = kArithmetic_;
  static constexpr int kRanks = 16;
  static constexpr int kRowFragments = kRows / 16, kRankFragments = kRanks / 8;
  static constexpr int kLaneDepth = kChunkBytes / static_cast<int>(sizeof(T)),
                       kQuads = kLaneDepth / 4;
  using Tile = FactorTile<Factor, FactorLayout::kDepthContiguous, kRanks, 4 * kLaneDepth>;
  using Sums = Accumulators<RankWarp>;
  using X = XFragments<RankWarp>;

  __device__ static void multiply(Sums& sums, const X& x, const unsigned char* factor, int lane) {
    if constexpr (kArithmetic == Arithmetic::kHalfMasters) {
      multiply_tf32<RankWarp>(sums, x, factor, lane);
    } else if constexpr (sizeof(Factor) == 4) {
      multiply_rounded<RankWarp>(sums, x, factor, lane);
    } else {
      multiply_pairs<RankWarp>(sums, x, factor, lane);
    }
  }
};

template <typename T_, Arithmetic kArithmetic_, typename Factor, bool kDepthContiguous, int kRanks_>
struct Traits {
  using T = T_;
  static constexpr Arithmetic kArithmetic = kArithmetic_;
  using Packed = PackedElement<T, kArithmetic>;
  using Out = std::conditional_t<kArithmetic == Arithmetic::kHalf, T, float>;  // of h
  using Gemm = lora_gemm::Traits<T, Packed, kDepthContiguous, lora_gemm::kFewRows>;
  static constexpr int kRows = Gemm::kTile.rows, kColumns = Gemm::kTile.columns;

  static constexpr int kRanks = kRanks_;
  using Product = RankWarp<T, kArithmetic, Factor, kRows>;
  using Tile = typename Product::Tile;
  static constexpr int kWarpRanks = Product::kRanks;
  static constexpr int kRankWarps = kRanks / kWarpRanks;
  static constexpr int kThreads = Gemm::kThreads + 32 * kRankWarps;
  static_assert(Tile::kDepth == Gemm::kDepth, "a rank warp's slice is as deep as X's tile");

  static constexpr int kStageBytes = Gemm::kStageBytes + kRankWarps * Tile::kBytes;
  static constexpr int kLimit = 48 * 1024;
  static constexpr int kStages = std::min(6, kLimit / kStageBytes);
  static_assert(kStages >= 3, "two stages are under way while one is read");
  static constexpr int kRankTiles =
      (kPackedParts<kArithmetic> * kRanks * static_cast<int>(sizeof(Packed)) + kPackedTileBytes -
       1) /
      kPackedTileBytes;
  static constexpr int kLowRankBytes = kRankTiles * Gemm::kStageBytes + kRows * kRanks * 4;
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kLowRankBytes);
  static_assert(kSharedBytes <= kLimit, "no kernel has to opt in");
};

template <typename Traits>
class Block {
  using Gemm = typename Traits::Gemm;
  using Copies = lora_gemm::TileCopies<Gemm>;
  static constexpr int kRowTileBytes = Copies::kRowTileBytes;

 public:
  __device__ Block(const Params& p, unsigned char* shared)
      : p_(p),
        shared_(shared),
        first_row_(static_cast<int>(blockIdx.y) * Traits::kRows),
        first_column_(static_cast<int>(blockIdx.x) * Traits::kColumns),
        tiles_((p.depth + Gemm::kDepth - 1) / Gemm::kDepth),
        window_(window_of_rows(p.row_adapters, first_row_, min(Traits::kRows, p.rows - first_row_),
                               {0, p.rank})) {
    if (is_rank_warp()) return;
    copies_.begin_rows(p.x, p.x_pitch, first_row_, p.rows);
    copies_.begin_columns(p.weight, p.weight_pitch, first_column_, p.columns);
  }

  __device__ void run() {
    const lora_gemm::RowFragmentOffsets<Gemm> row_offsets(Gemm::warp_row(warp()));
    const lora_gemm::ColumnFragmentOffsets<Gemm> column_offsets(Gemm::warp_column(warp()));
    lora_gemm::Accumulators<Gemm> sums = {};
    typename Traits::Product::Sums rank_sums = {};

#pragma unroll 1
    for (int tile = 0; tile < Traits::kStages - 1; ++tile) copy(tile, tile);
    int read = 0, write = Traits::kStages - 1;
#pragma unroll 1
    for (int tile = 0; tile < tiles_; ++tile) {
      ptx::cp_async_wait<Traits::kStages - 2>();
      __syncthreads();  // all copies of this tile have landed, and the stage that is filled next
                        // was read
      copy(tile + Traits::kStages - 1, write);
      if (is_rank_warp()) {
        if (has_ranks()) multiply_ranks(rank_sums, read);
      } else {
        multiply<typename Traits::T>(sums, row_offsets, column_offsets, stage_address(read));
      }
      read = read == Traits::kStages - 1 ? 0 : read + 1;
      write = write == Traits::kStages - 1 ? 0 : write + 1;
    }

    __syncthreads();  // the stages have been read, and no copy is under way
    if (is_rank_warp()) write_h(rank_sums);
    __syncthreads();
    pack_low();
    const bool finite = pack_factor();
    if (blockIdx.x == 0) store_h();
    const bool contained = __syncthreads_and(finite) || p_.row_adapters == nullptr;
    const int rank_tiles = contained ? packed_depth() / kPackedDepth : 0;
    if (!is_rank_warp()) {
#pragma unroll 1
      for (int tile = 0; tile < rank_tiles; ++tile) {
        multiply<typename Traits::Packed>(sums, row_offsets, column_offsets,
                                          ptx::shared_address(shared_) + tile * Gemm::kStageBytes);
      }
      if (!contained) {
#pragma unroll 1
        for (int rank = window_.begin; rank < window_.end; ++rank) add_rank(sums, rank);
      }
    }
    __syncthreads();
    if (!is_rank_warp()) {
      const lora_gemm::Output to = {p_.y,
                                    p_.columns * static_cast<int64_t>(sizeof(typename Traits::T)),
                                    p_.bias,
                                    p_.rows,
                                    p_.columns,
                                    first_row_ + Gemm::warp_row(warp()),
                                    first_column_ + Gemm::warp_column(warp())};
      using Epilogue = lora_gemm::Epilogue<Gemm>;
      Epilogue::store(sums, to, ptx::shared_address(shared_) + warp() * Epilogue::kWarpBytes);
    }
  }

 private:
  static constexpr int kPackedDepth =
      kPackedTileBytes / static_cast<int>(sizeof(typename Traits::Packed));

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static bool is_rank_warp() { return warp() >= Gemm::kWarps; }
  __device__ static int rank_warp() { return warp() - Gemm::kWarps; }
  __device__ uint32_t stage_address(int stage) const {
    return ptx::shared_address(shared_) + stage * Traits::kStageBytes;
  }
  __device__ unsigned char* factor_tile(int stage) const {
    return shared_ + stage * Traits::kStageBytes + Gemm::kStageBytes +
           rank_warp() * Traits::Tile::kBytes;
  }
  // Whether a row uses any of this rank warp's ranks.
  __device__ bool has_ranks() const {
    return window_.overlaps(rank_warp() * Traits::kWarpRanks, Traits::kWarpRanks);
  }
  __device__ int packed_depth() const {
    const int depth = kPackedParts<Traits::kArithmetic> * window_.size();
    return (depth + kPackedDepth - 1) / kPackedDepth * kPackedDepth;
  }

  // A tile of the reduction; beyond the last an empty group, because the waits count groups.
  __device__ void copy(int tile, int stage) {
    if (tile < tiles_) {
      const int depth = tile * Gemm::kDepth;
      if (is_rank_warp()) {
        if (has_ranks()) copy_ranks(depth, stage);
      } else {
        const uint32_t to = stage_address(stage);
        copies_.copy_part(to + Copies::row_offset(), to + Copies::column_offset(),
                          p_.depth - depth);
        copies_.rows.from += kPackedTileBytes;
        copies_.columns.from += Copies::column_step(p_.weight_pitch);
      }
    }
    ptx::cp_async_commit();
  }

  __device__ void copy_ranks(int depth, int stage) const {
    const FactorSlice slice = {p_.lora_a, 1,       p_.lora_a_stride,
                               p_.depth,  window_, rank_warp() * Traits::kWarpRanks};
    Traits::Tile::copy_chunks(factor_tile(stage), slice, depth, lane());
  }

  template <typename Element>
  __device__ static void multiply(lora_gemm::Accumulators<Gemm>& sums,
                                  const lora_gemm::RowFragmentOffsets<Gemm>& row_offsets,
                                  const lora_gemm::ColumnFragmentOffsets<Gemm>& column_offsets,
                                  uint32_t tile) {
#pragma unroll
    for (int step = 0; step < Gemm::kSteps; ++step) {
      lora_gemm::Fragments<Gemm> fragments;
      row_offsets.load(fragments.a, tile, step);
      column_offsets.load(fragments.b, tile + kRowTileBytes, step);
      lora_gemm::multiply<Element, Gemm>(sums, fragments);
    }
  }

  // X's tile lies as lora_gemm reads it; a rank warp takes the chunks that its lanes own.
  __device__ void multiply_ranks(typename Traits::Product::Sums& sums, int stage) const {
    const unsigned char* tile = shared_ + stage * Traits::kStageBytes;
    typename Traits::Product::X x;
#pragma unroll
    for (int m = 0; m < Traits::kRows / 16; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + lane() / 4;
        const uint4 chunk =
            *reinterpret_cast<const uint4*>(tile + swizzled<kPackedTileBytes>(row, lane() % 4));
        x.chunk[m][half][0] = chunk.x, x.chunk[m][half][1] = chunk.y;
        x.chunk[m][half][2] = chunk.z, x.chunk[m][half][3] = chunk.w;
      }
    }
    Traits::Product::multiply(sums, x, factor_tile(stage), lane());
  }

  // Of a row that there is, counted from the CTA's first.
  __device__ RankWindow window_of(int row) const {
    return window_of_row(p_.row_adapters, first_row_ + row, p_.rank);
  }
  __device__ float scaling_of(int row) const {
    return p_.scaling * scaling_of_row(p_.row_adapters, first_row_ + row);
  }

  // h in fp32, behind the tiles of the low-rank product.
  __device__ float* h() const {
    return reinterpret_cast<float*>(shared_ + Traits::kRankTiles * Gemm::kStageBytes);
  }
  __device__ void write_h(const typename Traits::Product::Sums& sums) const {
#pragma unroll
    for (int m = 0; m < Traits::kRows / 16; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kWarpRanks / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 16 * m + lane() / 4 + 8 * (e / 2);
          const int rank = rank_warp() * Traits::kWarpRanks + 8 * n + lane() % 4 * 2 + e % 2;
          const bool uses = first_row_ + row < p_.rows && window_of(row).has(rank);
          h()[row * Traits::kRanks + rank] = uses ? scaling_of(row) * sums[m][n][e] : 0.0f;
        }
      }
    }
  }
  __device__ void store_h() const {
    using Out = typename Traits::Out;
    const int rows = min(Traits::kRows, p_.rows - first_row_);
    Out* to = static_cast<Out*>(p_.h) + first_row_ * p_.h_stride;
    for (int i = threadIdx.x; i < rows * p_.rank; i += Traits::kThreads) {
      const int row = i / p_.rank, rank = i % p_.rank;
      to[row * p_.h_stride + rank] = from_float<Out>(h()[row * Traits::kRanks + rank]);
    }
  }

  using Packed = typename Traits::Packed;
  // Number d of a row of a packed operand; value(j) is the operand's number for rank j.
  template <typename Value>
  __device__ Packed packed(int d, PackedSide side, const Value& value) const {
    const int part = d / window_.size();
    if (part >= kPackedParts<Traits::kArithmetic>) return from_float<Packed>(0.0f);
    return packed_part<Packed>(value(window_.begin + d - part * window_.size()), part, side);
  }
  // Numbers of a 16-byte chunk.
  static constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(Packed));

  __device__ float lora_b(int column, int rank) const {
    const int64_t n = first_column_ + column;
    if (n >= p_.columns) return 0.0f;
    const auto* data = static_cast<const typename Traits::Tile::Element*>(p_.lora_b.data);
    return to_float(data[n * p_.lora_b.row_stride + rank * p_.lora_b.column_stride]);
  }

  __device__ void pack_low() const {
    const int depth = packed_depth();
    for (int i = threadIdx.x; i < Traits::kRows * depth; i += Traits::kThreads) {
      const int row = i / depth, d = i % depth, within = d % kPackedDepth;
      unsigned char* to = shared_ + d / kPackedDepth * Gemm::kStageBytes +
                          swizzled<kPackedTileBytes>(row, within / kChunkElements);
      reinterpret_cast<Packed*>(to)[within % kChunkElements] =
          packed(d, PackedSide::kLow, [&](int j) { return h()[row * Traits::kRanks + j]; });
    }
  }
  // Whether all that this thread packed is finite.
  __device__ bool pack_factor() const {
    const int depth = packed_depth();
    bool finite = true;
    for (int i = threadIdx.x; i < Traits::kColumns * depth; i += Traits::kThreads) {
      const int column = i / depth, d = i % depth, within = d % kPackedDepth;
      unsigned char* tile = shared_ + d / kPackedDepth * Gemm::kStageBytes + kRowTileBytes;
      const Packed value = packed(d, PackedSide::kFactor, [&](int j) { return lora_b(column, j); });
      finite &= isfinite(to_float(value));
      if constexpr (Gemm::kDepthContiguous) {
        unsigned char* to = tile + swizzled<kPackedTileBytes>(column, within / kChunkElements);
        reinterpret_cast<Packed*>(to)[within % kChunkElements] = value;
      } else {
        unsigned char* to =
            tile + lora_gemm::column_tile_offset<Gemm>(within, column / kChunkElements);
        reinterpret_cast<Packed*>(to)[column % kChunkElements] = value;
      }
    }
    return finite;
  }

  // Both numbers as the matrix units would see them.
  __device__ void add_rank(lora_gemm::Accumulators<Gemm>& sums, int rank) const {
    const auto seen = [](float value) { return to_float(from_float<typename Traits::Out>(value)); };
    lora_gemm::add_rank<Gemm>(
        sums, [&](int row) { return first_row_ + row < p_.rows && window_of(row).has(rank); },
        [&](int row) { return seen(h()[row * Traits::kRanks + rank]); },
        [&](int column) { return seen(lora_b(column, rank)); });
  }

  const Params& p_;
  unsigned char* const shared_;
  const int first_row_, first_column_, tiles_;
  const RankWindow window_;  // of the CTA's rows
  Copies copies_;
};

// Grid: (tiles of columns, tiles of rows) of Traits::kThreads threads. Two blocks share an SM: told
// so, ptxas does not spill to make room for more.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  Block<Traits>(params, shared).run();
}

template <typename Traits>
cudaError_t launch_kernel(const Params& params, cudaStream_t stream) {
  const dim3 grid((params.columns + Traits::kColumns - 1) / Traits::kColumns,
                  (params.rows + Traits::kRows - 1) / Traits::kRows);
  kernel<Traits><<<grid, Traits::kThreads, Traits::kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, Arithmetic kArithmetic, typename Factor, bool kDepthContiguous>
cudaError_t launch_ranks(const Params& params, int ranks, cudaStream_t stream) {
  if (ranks == 16) {
    return launch_kernel<Traits<T, kArithmetic, Factor, kDepthContiguous, 16>>(params, stream);
  }
  if constexpr (sizeof(Factor) == 2) {
    if (ranks == 64) {
      return launch_kernel<Traits<T, kArithmetic, Factor, kDepthContiguous, 64>>(params, stream);
    }
  }
  return launch_kernel<Traits<T, kArithmetic, Factor, kDepthContiguous, 32>>(params, stream);
}

template <typename T, bool kDepthContiguous>
cudaError_t launch_arithmetic(const Params& params, Arithmetic arithmetic, DType adapter_dtype,
                              int ranks, cudaStream_t stream) {
  if (arithmetic == Arithmetic::kHalfMasters) {
    return launch_ranks<T, Arithmetic::kHalfMasters, float, kDepthContiguous>(params, ranks,
                                                                              stream);
  }
  return adapter_dtype == DType::kFloat32
             ? launch_ranks<T, Arithmetic::kHalf, float, kDepthContiguous>(params, ranks, stream)
             : launch_ranks<T, Arithmetic::kHalf, T, kDepthContiguous>(params, ranks, stream);
}

template <typename T>
cudaError_t launch(const Params& params, Arithmetic arithmetic, DType adapter_dtype,
                   bool depth_contiguous, int ranks, cudaStream_t stream) {
  return depth_contiguous
             ? launch_arithmetic<T, true>(params, arithmetic, adapter_dtype, ranks, stream)
             : launch_arithmetic<T, false>(params, arithmetic, adapter_dtype, ranks, stream);
}

}  // namespace fused_lora::kernels::small_rows
