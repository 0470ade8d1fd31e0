// The frozen GEMM with the low-rank product in the same accumulators, sm_80 and newer (mma.sync,
// ldmatrix, cp.async):
//
//     out = mask ∘ (low · factor) · scale + X · W + bias + addend
//
//     forward     out = y    low = h (M×r)   factor = Bᵀ   X = x  (M×K)   W: K×N
//     backward    out = dx   low = g (M×r)   factor = A    X = dy (M×N)   W: N×K, x's mask
//
// To the main loop the rank is more tiles of the reduction, read through another pair of pointers.
// They come first: the mask of backward multiplies the accumulators between them and X's tiles. The
// low-rank operands are zero-padded to whole tiles (stages.h), so that they need no edge of their
// own. Where rows have adapters of their own (row_adapters), a CTA multiplies the tiles that hold a
// rank of its rows (rank_tiles.cuh). Where there is no X and no W, a depth of zero, the rank's
// tiles are all there is: a rank-up, bound by reading the addend and writing out.
//
// Layouts. X and low: rows, depth contiguous. W and factor: columns × depth with the depth
// contiguous (nn.Linear forward, Conv1D backward), or depth × columns (nn.Linear backward, Conv1D
// forward); the two differ in how a tile is copied and in ldmatrix's .trans. Rows begin at
// multiples of 16 bytes.
//
// Shared memory, for the large tile in 16 bits, swizzled (tile/swizzle.cuh):
//
//     main loop   3 stages × (X 128 × 64 bytes, W 128 × 64 bytes)    48 KiB
//     epilogue    4 warps: each its 64×64 elements of out            32 KiB of the same
//
// The main loop holds the sums of a 64×64 warp tile in 128 registers and two steps' fragments in
// 64, one being multiplied while the other is loaded. It has no branch but its own and no
// predicate: rows and columns beyond the matrix are clamped (what they add is never stored), and
// the last tile of the reduction, the only one that may be ragged, is left to a loop of its own
// behind it.
#pragma once

#include "kernels/lora_gemm/epilogue.cuh"
#include "kernels/lora_gemm/fragments.cuh"
#include "kernels/lora_gemm/one_rank.cuh"
#include "kernels/lora_gemm/params.h"
#include "kernels/lora_gemm/rank_tiles.cuh"
#include "kernels/ptx/shared_address.cuh"
#include "kernels/tile/dropout.cuh"

namespace fused_lora::kernels::lora_gemm {

// Tiles of the output in the order of CTAs: a few rows of tiles at a time, column by column, so
// that the CTAs that run together share X's and W's tiles in L2. Made of shifts, so that it can be
// made anew wherever it is needed: kept, it would take the main loop's registers.
struct TilePosition {
  int row, column;

  __device__ explicit TilePosition(const Params& p) {
    const int x = ptx::block_x();
    row = (ptx::block_y() << p.group_shift) + (x & ((1 << p.group_shift) - 1));
    column = x >> p.group_shift;
  }
};

template <typename Traits>
class Block {
  static constexpr Tile kTile = Traits::kTile;
  using Copies = TileCopies<Traits>;

 public:
  __device__ Block(const Params& p, uint32_t shared)
      : p_(p),
        main_tiles_((p.depth + Traits::kDepth - 1) / Traits::kDepth),
        shared_(shared),
        row_offsets_(warp_row()),
        column_offsets_(warp_column()),
        row_to_(shared + Copies::row_offset()),
        column_to_(shared + Copies::column_offset()) {}

  // Tiles are numbered from X's first: those of the rank, which come before, have negative numbers.
  __device__ void run() {
    multiply_ranks();
    int tile = 0;
    // The main loop: each copy is a whole tile of X and W.
    Copies copies;
    begin(copies, false, tile + kTile.stages - 1);
    const int64_t column_step = Copies::column_step(p_.weight_pitch);
#pragma unroll 1
    for (int left = main_tiles_ - kTile.stages; left > 0; --left, ++tile) {
      multiply_tile<typename Traits::T>([&] {
        copies.copy(row_to_ + write_, column_to_ + write_);
        copies.rows.from += kPackedTileBytes;
        copies.columns.from += column_step;
      });
    }
#pragma unroll 1
    for (; tile < main_tiles_; ++tile) {
      multiply_tile<typename Traits::T>([&] { copy_main(tile + kTile.stages - 1); });
    }
    store();
  }

 private:
  __device__ static int warp() { return ptx::thread_x() / 32; }
  __device__ static int warp_row() { return Traits::warp_row(warp()); }
  __device__ static int warp_column() { return Traits::warp_column(warp()); }

  // Fills the first stages, and brings the rank's sums, masked, to sums_.
  __device__ void multiply_ranks() {
    const int first_row = TilePosition(p_).row * kTile.rows;
    const RankTiles<Traits::kDepth> ranks(p_, first_row, min(kTile.rows, p_.rows - first_row));
    int tile = -ranks.count();
    const auto copy = [&](int next) {
      if (next < 0) {
        copy_ranks(ranks.tile(next + ranks.count()));
      } else {
        copy_main(next);
      }
    };
#pragma unroll 1
    for (int stage = 0; stage < kTile.stages - 1; ++stage) {
      copy(tile + stage);
      ptx::cp_async_commit();
      advance(write_);
    }
    ptx::cp_async_wait<kTile.stages - 2>();
    __syncthreads();
    load(0, 0);
#pragma unroll 1
    for (; tile < 0; ++tile) {
      multiply_tile<typename Traits::Packed>([&] { copy(tile + kTile.stages - 1); });
    }
    if (p_.row_adapters != nullptr) contain(ranks.window());
    if (p_.dropout.active()) mask();
    // Again: the registers of the first fragments are the mask's meanwhile.
    if (p_.row_adapters != nullptr || p_.dropout.active()) load(0, 0);
  }

  // Tile `tile` of X and W, or of the low-rank operands.
  __device__ void begin(Copies& copies, bool low_rank, int tile) const {
    const TilePosition position(p_);
    const int64_t pitch = low_rank ? p_.factor_pitch : p_.weight_pitch;
    copies.begin_rows(low_rank ? p_.low : p_.x, low_rank ? p_.low_pitch : p_.x_pitch,
                      position.row * kTile.rows, p_.rows);
    copies.begin_columns(low_rank ? p_.factor : p_.weight, pitch, position.column * kTile.columns,
                         p_.columns);
    copies.rows.from += static_cast<int64_t>(tile) * kPackedTileBytes;
    copies.columns.from += tile * Copies::column_step(pitch);
  }

  // The copies of one tile; none beyond the last. Their addresses are made anew each time: kept,
  // they would take the main loop's registers.
  __device__ void copy_main(int tile) const {
    if (tile < main_tiles_) copy_part(false, tile, p_.depth - tile * Traits::kDepth);
  }
  __device__ void copy_ranks(int tile) const { copy_part(true, tile, Traits::kDepth); }
  __device__ void copy_part(bool low_rank, int tile, int left) const {
    Copies copies;
    begin(copies, low_rank, tile);
    copies.copy_part(row_to_ + write_, column_to_ + write_, left);
  }

  __device__ void load(int buffer, int step) {
    row_offsets_.load(fragments_[buffer].a, shared_ + read_, step);
    column_offsets_.load(fragments_[buffer].b, shared_ + read_ + Copies::kRowTileBytes, step);
  }

  // Multiplies a tile whose first step is in fragments_[0] already, and leaves the next one's
  // there. `copy` fills the stage that the tile before this one was read from: every warp has
  // passed the barrier behind its last read of it.
  template <typename Element, typename Copy>
  __device__ void multiply_tile(const Copy& copy) {
    load(1, 1);
    copy();
    ptx::cp_async_commit();
    advance(write_);
    multiply<Element, Traits>(sums_, fragments_[0]);
    ptx::cp_async_wait<kTile.stages - 2>();
    __syncthreads();
    advance(read_);
    load(0, 0);
    multiply<Element, Traits>(sums_, fragments_[1]);
  }

  __device__ static void advance(uint32_t& stage) {
    constexpr uint32_t kLast = (kTile.stages - 1) * Traits::kStageBytes;
    stage = stage == kLast ? 0 : stage + Traits::kStageBytes;
  }

  // The rank's tiles are in sums_ and nothing else. Where a sum is not a number another adapter's
  // may be the cause (one_rank.cuh): the warp sums once more, of each row its own ranks alone.
  __device__ void contain(const RankWindow& window) {
    if (__all_sync(0xffffffffu, are_numbers(sums_))) return;
    set_to_zero(sums_);
#pragma unroll 1
    for (int part = 0; part < p_.parts; ++part) {
#pragma unroll 1
      for (int rank = window.begin; rank < window.end; ++rank) {
        add_rank(rank, part * p_.rank + rank);
      }
    }
  }
  // depth: of `rank` in the packed operands.
  __device__ void add_rank(int rank, int depth) {
    using Packed = typename Traits::Packed;
    const TilePosition position(p_);
    const int first_row = position.row * kTile.rows, first_column = position.column * kTile.columns;
    const auto number = [](const void* data, int64_t offset) {
      return to_float(*reinterpret_cast<const Packed*>(static_cast<const char*>(data) + offset));
    };
    lora_gemm::add_rank<Traits>(
        sums_,
        [&](int row) {
          return first_row + row < p_.rows &&
                 window_of_row(p_.row_adapters, first_row + row, p_.rank).has(rank);
        },
        [&](int row) {
          return number(p_.low, (first_row + row) * p_.low_pitch + depth * Traits::kElementBytes);
        },
        [&](int column) {
          const int64_t outer = min(first_column + column, p_.columns - 1);
          const int64_t offset = Traits::kDepthContiguous
                                     ? outer * p_.factor_pitch + depth * Traits::kElementBytes
                                     : depth * p_.factor_pitch + outer * Traits::kElementBytes;
          return number(p_.factor, offset);
        });
  }

  // The rank's tiles are in sums_ and nothing else: what x's mask dropped they must not reach.
  __device__ void mask() {
    const DropoutKey key = dropout_key(p_.dropout);
    const TilePosition position(p_);
    // In 32 bits, which suffice by far and leave registers to the sums.
    const uint32_t row = position.row * kTile.rows + warp_row() + lane() / 4;
    const uint32_t block = key.block_of(position.column * kTile.columns + warp_column());
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < Traits::kColumnFragments; j += 2) {
        const uint4 words = quad_words(key, row + 16 * i, block + j);
        apply(sums_[i][j][0], sums_[i][j][1], words.x);
        apply(sums_[i][j][2], sums_[i][j][3], words.y);
        apply(sums_[i][j + 1][0], sums_[i][j + 1][1], words.z);
        apply(sums_[i][j + 1][2], sums_[i][j + 1][3], words.w);
      }
    }
  }
  __device__ void apply(float& low, float& high, uint32_t word) const {
    low = (word & 0xffffu) < p_.dropout.keep ? low * p_.dropout.scale : 0.0f;
    high = (word >> 16) < p_.dropout.keep ? high * p_.dropout.scale : 0.0f;
  }

  __device__ void store() {
    const TilePosition position(p_);
    const Output to = {p_.out,
                       p_.out_pitch,
                       p_.bias,
                       p_.rows,
                       p_.columns,
                       position.row * kTile.rows + warp_row(),
                       position.column * kTile.columns + warp_column(),
                       p_.addend,
                       p_.addend_pitch};
    __syncthreads();  // the stages have been read, and no copy is under way
    Epilogue<Traits>::store(sums_, to, shared_ + warp() * Epilogue<Traits>::kWarpBytes);
  }
  __device__ static int lane() { return ptx::thread_x() % 32; }

  const Params& p_;
  const int main_tiles_;
  const uint32_t shared_;
  RowFragmentOffsets<Traits> row_offsets_;
  ColumnFragmentOffsets<Traits> column_offsets_;
  const uint32_t row_to_, column_to_;  // where this thread's first chunks go in stage 0
  uint32_t write_ = 0, read_ = 0;      // stages, as offsets
  Fragments<Traits> fragments_[Traits::kSteps];
  Accumulators<Traits> sums_ = {};
};

// Grid: tiles of columns << group_shift, groups of rows of tiles. Traits::kThreads threads.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.ctas)
    kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) char shared[];
  // The last group may have fewer rows of tiles.
  if (TilePosition(params).row * Traits::kTile.rows >= params.rows) return;
  Block<Traits>(params, ptx::shared_address(shared)).run();
}

}  // namespace fused_lora::kernels::lora_gemm
