// rank-grad (sm_80: mma.sync, ldmatrix, cp.async): a long reduction over the rows into a skinny
// output.
//
//     out[c][j] = alpha · Σ_m drop(X)[m][c] · low[m][j]
//
//     dB   X = dy (M×N)   low = h (M×r)   out: N×r
//     dA   X = x  (M×K)   low = g (M×r)   out: r×K, written transposed; x under its dropout mask
//
// Several may share one launch: what one reads is not what the other writes, and their blocks fill
// the device together. Bound by reading X once; low is read by every block of a share of the rows,
// from L2. Those of one X (dA of projections that share their input) have their blocks side by
// side, so that X comes from DRAM once for all of them.
//
// Layouts. X: rows of 16-byte chunks, any pitch of whole chunks. low: dense, of any rank. out:
// dense; or partial sums, fp32 in out's layout, one for each share of the rows, which the launch
// behind adds in order.
//
// A block owns 64 columns × 16 ranks, or 128 columns × 32 or 64 ranks, of a share of whole row
// tiles. A warp owns a quarter of the columns and all ranks: no sum crosses warps. In the mma, X's
// columns are the rows, so that both operands have the depth as the tiles' rows and are transposed
// by the same loads.
//
// Shared memory, of 16-bit X and low:
//
//     ranks   main loop                                                        epilogue, fp32
//     16      4 × (X 64 rows × 64 columns + low 64 × 16)   4 × (8 + 2) KiB     64 × 16    4 KiB
//     32      4 × (X 32 × 128 + low 32 × 32)               4 × (8 + 2) KiB     128 × 32  16 KiB
//     64      4 × (X 32 × 128 + low 32 × 64)               4 × (8 + 4) KiB     128 × 64  32 KiB
//
// The epilogue's lies where the stages were. fp32 `low` doubles its part; stages of more than
// 12 KiB are three, so that two blocks fit an SM of 100 KiB. fp32 X has half the rows.
//
// Where rows have adapters of their own (row_adapters), rows of X that use none of a block's ranks
// are not read: zeros stand in for them. A sum that is not a number may have been made so by a row
// that does not use its rank, whose zero in low met what X holds there: then the warp sums once
// more without matrix units, the rows that use a rank alone.
//
// Dropout is applied to a stage in shared memory, by the threads that copied it: they see their own
// chunks before the barrier that the stage needs anyway.
#pragma once

#include "kernels/ptx/shared_address.cuh"
#include "kernels/rank_grad/products.cuh"
#include "kernels/rank_grad/shapes.h"
#include "kernels/rank_grad/staged_sums.cuh"
#include "kernels/rank_grad/thin_copy.cuh"
#include "kernels/tile/dropout.cuh"
#include "kernels/tile/rank_window.cuh"

namespace fused_lora::kernels::rank_grad {

template <typename T_, Arithmetic kArithmetic_, int kRanks_>
struct GradTraits {
  using T = T_;
  static constexpr Arithmetic kArithmetic = kArithmetic_;
  static constexpr int kRanks = kRanks_;
  static constexpr int kColumns = column_tile(kRanks);
  static constexpr int kRows = row_tile(kRanks, sizeof(T));
  static constexpr int kWarpColumns = kColumns / (kThreads / 32);
  static constexpr int kLeft = kWarpColumns / 16, kRight = kRanks / 8;  // fragments of a warp
  using Low = std::conditional_t<kArithmetic == Arithmetic::kHalf, T, float>;
  using LongTile = DepthTile<T, kColumns>;
  using ThinTile = DepthTile<Low, kRanks, kArithmetic == Arithmetic::kHalfMasters>;
  static constexpr int kThinBytes = kRows * ThinTile::kRowBytes;
  static constexpr int kStages = kStageBytes + kThinBytes > 12 * 1024 ? 3 : 4;
  static constexpr int kSharedBytes = kStages * (kStageBytes + kThinBytes);
  // Blocks that fit an SM of 160 KiB side by side; the registers are to allow as many. fp32 `low`
  // of 64 ranks beside 16-bit X takes more of them.
  static constexpr bool kWideSplit = kRanks == 64 && kArithmetic == Arithmetic::kHalfMasters;
  static constexpr int kBlocks = kRanks == 16 ? 4 : kWideSplit ? 2 : 3;
  static_assert(kColumns * kRanks * 4 <= kSharedBytes, "the stages hold the sums");
  static_assert(kRows % LongTile::kStepRows == 0, "whole steps");
};

struct GradParams {
  const void* x;
  int64_t x_pitch;  // bytes
  Thin low;
  int64_t rows, columns;
  float alpha;
  const RowAdapter* row_adapters;  // or null
  Dropout dropout;
  bool transposed;
  int splits;
  int64_t row_tiles, tiles_per_split;
  int column_tiles;
  void* out;  // with several splits: partials, fp32
  DType out_dtype;
};

// Stages of one X are a set: their tiles of ranks take turns, in their order.
struct Member {
  int first_block;  // of the set
  int set_tiles;    // tiles of ranks, of the whole set
  int first_tile;   // of the stage's own among them
};

struct LaunchParams {
  GradParams stages[kMostGrads];
  Member members[kMostGrads];
  int count;
};

template <typename Traits>
class GradBlock {
  using T = typename Traits::T;
  using LongTile = typename Traits::LongTile;
  using ThinTile = typename Traits::ThinTile;
  static constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns;
  static constexpr int kStages = Traits::kStages;
  static constexpr int kElements = kChunkBytes / static_cast<int>(sizeof(T));
  // A thread copies a chunk of every kRowStep-th row, always the same of a row's.
  static constexpr int kRowStep = kThreads / LongTile::kChunks;
  static constexpr int kCopies = kRows / kRowStep;
  static_assert(kRows * LongTile::kRowBytes == kStageBytes, "X's part of a stage");

 public:
  // place: of the block among those of its set that have the same tile of ranks. Blocks that read
  // the same columns of X, for other ranks, are neighbours; then come those that read on in the
  // same rows.
  __device__ GradBlock(const GradParams& p, int rank_tile, int place, uint32_t shared)
      : p_(p), shared_(shared) {
    first_rank_ = rank_tile * Traits::kRanks;
    first_column_ = static_cast<int64_t>(place % p.column_tiles) * kColumns;
    split_ = place / p.column_tiles;
    const int64_t first = static_cast<int64_t>(split_) * p.tiles_per_split;
    first_row_ = first * kRows;
    tiles_ = static_cast<int>(max(min(p.row_tiles - first, p.tiles_per_split), int64_t{0}));
  }

  __device__ void run() {
    const DropoutKey key = dropout_key(p_.dropout);
    const bool drops = p_.dropout.active();
    const LeftFragments<LongTile, Traits::kLeft> left(warp() * Traits::kWarpColumns);
    const RightFragments<ThinTile, Traits::kRight> right;
#pragma unroll 1
    for (int tile = 0; tile < kStages - 1; ++tile) copy(tile);
    uint32_t stage = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles_; ++tile) {
      ptx::cp_async_wait<kStages - 2>();
      if (drops) mask(long_tile(stage), key, tile);
      __syncthreads();
      // Into the stage of the tile before this one: every warp is past it.
      copy(tile + kStages - 1);
      multiply(left, right, stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (p_.row_adapters != nullptr) contain(key);
    // The sums go where the stages were. No copy is under way: the groups left are empty.
    __syncthreads();
    if (p_.transposed) {
      store_by_rank();
    } else {
      store_by_column();
    }
  }

 private:
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int group() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  __device__ static int copy_row() { return static_cast<int>(threadIdx.x) / LongTile::kChunks; }
  __device__ static int copy_chunk() { return static_cast<int>(threadIdx.x) % LongTile::kChunks; }
  __device__ uint32_t long_tile(uint32_t stage) const { return shared_ + stage * kStageBytes; }
  __device__ uint32_t thin_tile(uint32_t stage) const {
    return shared_ + kStages * kStageBytes + stage * Traits::kThinBytes;
  }

  // A tile's rows of X and low; nothing beyond the last, but a group of copies all the same.
  __device__ void copy(int tile) const {
    if (tile < tiles_) {
      const uint32_t stage = static_cast<uint32_t>(tile) % kStages;
      const int64_t row = first_row_ + static_cast<int64_t>(tile) * kRows;
      const int rows = static_cast<int>(min(p_.rows - row, static_cast<int64_t>(kRows)));
      const int64_t column = first_column_ + copy_chunk() * kElements;
      const bool inside = column < p_.columns;
      const char* from = static_cast<const char*>(p_.x) + (row + copy_row()) * p_.x_pitch +
                         column * static_cast<int64_t>(sizeof(T));
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int r = copy_row() + i * kRowStep;
        ptx::cp_async_16_or_zeros(long_tile(stage) + LongTile::offset(r, copy_chunk()),
                                  from + i * kRowStep * p_.x_pitch,
                                  inside && r < rows && used(row + r));
      }
      copy_thin<ThinTile, kRows, kThreads>(thin_tile(stage), p_.low, row, rows, first_rank_);
    }
    ptx::cp_async_commit();
  }

  // Whether a row uses any of the block's ranks.
  __device__ bool used(int64_t row) const {
    return p_.row_adapters == nullptr ||
           window_of_row(p_.row_adapters, row, p_.low.rank).overlaps(first_rank_, Traits::kRanks);
  }

  // Zeros what is dropped of this thread's own chunks.
  __device__ void mask(uint32_t tile, const DropoutKey& key, int index) const {
    const uint64_t row = first_row_ + static_cast<int64_t>(index) * kRows + copy_row();
    const uint64_t block = key.block_of(first_column_ + copy_chunk() * kElements);
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const uint4 keep = block_masks(key, row + i * kRowStep, block);
        mask_chunk(tile + LongTile::offset(copy_row() + i * kRowStep, copy_chunk()), keep);
      }
    } else {
      // A Philox call decides two chunks of fp32, which two neighbouring lanes hold, in two rows:
      // each of them makes the call for one row, and gives the other the words of its chunk.
      static_assert(kCopies % 2 == 0, "rows are shared by twos");
      const bool odd = copy_chunk() % 2 != 0;
#pragma unroll
      for (int i = 0; i < kCopies; i += 2) {
        const Philox4x32 own = key.words(row + (i + (odd ? 1 : 0)) * kRowStep, block);
        const uint32_t sent0 = odd ? own.word[0] : own.word[2];
        const uint32_t sent1 = odd ? own.word[1] : own.word[3];
        const uint32_t got0 = __shfl_xor_sync(0xffffffffu, sent0, 1);
        const uint32_t got1 = __shfl_xor_sync(0xffffffffu, sent1, 1);
        const uint32_t kept0 = odd ? own.word[2] : own.word[0];
        const uint32_t kept1 = odd ? own.word[3] : own.word[1];
        const int r = copy_row() + i * kRowStep;
        mask_chunk(tile + LongTile::offset(r, copy_chunk()),
                   lane_masks(odd ? got0 : kept0, odd ? got1 : kept1, key.keep));
        mask_chunk(tile + LongTile::offset(r + kRowStep, copy_chunk()),
                   lane_masks(odd ? kept0 : got0, odd ? kept1 : got1, key.keep));
      }
    }
  }
  __device__ static uint4 lane_masks(uint32_t word0, uint32_t word1, uint32_t keep) {
    return {(word0 & 0xffffu) < keep ? ~0u : 0u, (word0 >> 16) < keep ? ~0u : 0u,
            (word1 & 0xffffu) < keep ? ~0u : 0u, (word1 >> 16) < keep ? ~0u : 0u};
  }
  __device__ static void mask_chunk(uint32_t at, const uint4& keep) {
    const uint4 v = ptx::load_shared_128(at);
    ptx::store_shared_128(at, {v.x & keep.x, v.y & keep.y, v.z & keep.z, v.w & keep.w});
  }

  template <typename Left, typename Right>
  __device__ void multiply(const Left& left, const Right& right, uint32_t stage) {
    constexpr int kThin = kThinSteps<Traits::kArithmetic>;
#pragma unroll
    for (int step = 0; step < kRows / LongTile::kStepRows; ++step) {
      uint32_t x[Traits::kLeft][4], low[kThin][Traits::kRight][2];
      left.load(x, long_tile(stage), step);
#pragma unroll
      for (int s = 0; s < kThin; ++s) right.load(low[s], thin_tile(stage), step * kThin + s);
      multiply_long_left<T, Traits::kArithmetic>(sums_, x, low);
    }
  }

  // Sums that are numbers are right.
  __device__ void contain(const DropoutKey& key) {
    if (__all_sync(0xffffffffu, are_numbers(sums_))) return;
    set_to_zero(sums_);
    const int64_t end = min(first_row_ + static_cast<int64_t>(tiles_) * kRows, p_.rows);
#pragma unroll 1
    for (int64_t row = first_row_; row < end; ++row) {
      if (used(row)) add_row(row, key);
    }
  }
  __device__ void add_row(int64_t row, const DropoutKey& key) {
    using Low = typename Traits::Low;
    using Left = LeftFragments<LongTile, Traits::kLeft>;
    using Right = RightFragments<ThinTile, Traits::kRight>;
    const RankWindow window = window_of_row(p_.row_adapters, row, p_.low.rank);
    const T* const x =
        reinterpret_cast<const T*>(static_cast<const char*>(p_.x) + row * p_.x_pitch);
    const Low* const low = static_cast<const Low*>(p_.low.data) + row * p_.low.stride;
    float left[Traits::kLeft][2];
#pragma unroll
    for (int i = 0; i < Traits::kLeft; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t column =
            first_column_ + warp() * Traits::kWarpColumns + Left::column(i, half);
        bool kept = column < p_.columns;
        if (p_.dropout.active()) kept &= element_kept(key, row, column);
        left[i][half] = kept ? to_float(x[column]) : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < Traits::kRight; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int rank = first_rank_ + Right::column(j, e);
        if (!window.has(rank)) continue;
        const float right = to_float(low[rank]);
#pragma unroll
        for (int i = 0; i < Traits::kLeft; ++i) {
          sums_[i][j][e] += left[i][0] * right;
          sums_[i][j][2 + e] += left[i][1] * right;
        }
      }
    }
  }

  __device__ int ranks() const { return min(Traits::kRanks, p_.low.rank - first_rank_); }
  __device__ int columns() const {
    return static_cast<int>(min(p_.columns - first_column_, static_cast<int64_t>(kColumns)));
  }

  __device__ void store_by_column() {
    using Left = LeftFragments<LongTile, Traits::kLeft>;
#pragma unroll
    for (int i = 0; i < Traits::kLeft; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = warp() * Traits::kWarpColumns + Left::column(i, half);
        stage_row<ThinTile>(shared_, column, half, sums_[i], p_.alpha);
      }
    }
    __syncthreads();
    const int64_t at = first_column_ * p_.low.rank + first_rank_;
    store<StagedByRow<Traits::kRanks>>(columns(), ranks(), at, p_.low.rank);
  }

  __device__ void store_by_rank() {
    using Left = LeftFragments<LongTile, Traits::kLeft>;
    using Right = RightFragments<ThinTile, Traits::kRight>;
    using Staged = StagedByRank<kColumns>;
    const int first = warp() * Traits::kWarpColumns;
#pragma unroll
    for (int j = 0; j < Traits::kRight; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int rank = Right::column(j, e);
        const auto value = [&](int i, int half) { return p_.alpha * sums_[i][j][2 * half + e]; };
        if constexpr (!LongTile::kWide) {
#pragma unroll
          for (int i = 0; i < Traits::kLeft; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int at = Staged::element_offset(rank, first + Left::column(i, half));
              ptx::store_shared_32(shared_ + at, __float_as_uint(value(i, half)));
            }
          }
        } else if constexpr (Traits::kLeft == 1) {
          ptx::store_shared_64(shared_ + Staged::element_offset(rank, first + 2 * group()),
                               __float_as_uint(value(0, 0)), __float_as_uint(value(0, 1)));
        } else {
          static_assert(Traits::kLeft == 2, "a lane holds four neighbouring columns");
          ptx::store_shared_128(shared_ + Staged::element_offset(rank, first + 4 * group()),
                                as_bits(value(0, 0), value(0, 1), value(1, 0), value(1, 1)));
        }
      }
    }
    __syncthreads();
    store<Staged>(ranks(), columns(), first_rank_ * p_.columns + first_column_, p_.columns);
  }

  template <typename Staged>
  __device__ void store(int outer, int inner, int64_t at, int64_t pitch) const {
    if (p_.splits > 1) at += split_ * (p_.columns * p_.low.rank);
    if (p_.splits > 1 || p_.out_dtype == DType::kFloat32) {
      float* out = static_cast<float*>(p_.out) + at;
      store_staged<Staged, kThreads>(shared_, outer, inner, out, pitch);
    } else if constexpr (sizeof(T) == 2) {
      T* out = static_cast<T*>(p_.out) + at;
      store_staged<Staged, kThreads>(shared_, outer, inner, out, pitch);
    }
  }

  const GradParams& p_;
  const uint32_t shared_;
  int64_t first_row_, first_column_;
  int split_, first_rank_, tiles_;
  float sums_[Traits::kLeft][Traits::kRight][4] = {};
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocks)
    kernel(const __grid_constant__ LaunchParams params) {
  extern __shared__ __align__(128) char shared[];
  // The last stage whose set begins no later than the block, and whose tiles no later than its
  // tile.
  int stage = 0, tile = 0, place = 0;
#pragma unroll 1
  for (int i = 0; i < params.count; ++i) {
    const Member& member = params.members[i];
    const int block = static_cast<int>(blockIdx.x) - member.first_block;
    if (block < 0 || block % member.set_tiles < member.first_tile) continue;
    stage = i;
    tile = block % member.set_tiles - member.first_tile;
    place = block / member.set_tiles;
  }
  GradBlock<Traits>(params.stages[stage], tile, place, ptx::shared_address(shared)).run();
}

}  // namespace fused_lora::kernels::rank_grad
