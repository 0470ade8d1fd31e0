// rank-down + rank-grad on one read of dy (sm_80: mma.sync, ldmatrix, cp.async):
//
//     g[m][j]  = alpha  · Σ_n dy[m][n] · B[n][j]       g: M×r, also packed for lora_gemm
//     dB[n][j] = alpha' · Σ_m dy[m][n] · h[m][j]       dB: N×r
//
// One sums over dy's columns and the other over its rows. A block owns 128 rows, a slice, and goes
// through all columns by tiles of 128 bytes, so that both products find dy's tile in shared memory:
// g's sums stay in registers over the whole loop, and dB's of the slice are finished with each tile
// and stored as the slice's partial sums (or, of one slice, as dB itself). The launch behind adds
// them in the slices' order.
//
// The slice is 128 rows because partial sums cost bytes: (M/128)·N·r·8, written and read, against
// the M·N·2 of a second read of dy in 16 bits. That is half at rank 16 and the same at rank 32;
// with half the rows both would double.
//
// A warp owns 16 of the slice's rows of g (32 in fp32), and 8 of the tile's columns of dB with all
// ranks and rows: no sum crosses warps. For dB, h is the mma's left operand, transposed, and dy the
// right one. h's fragments are the same for every tile: up to 64 registers hold them, otherwise
// they are loaded again.
//
// Layouts. dy: rows of 16-byte chunks, any pitch of whole chunks. h: dense, of any rank. B: any
// strides, in dy's dtype or fp32; it is converted on the way to shared memory, through registers, a
// tile ahead.
//
// Shared memory in KiB. The epilogue, g in fp32, lies where dy's stages were.
//
//     dy      thin operands   ranks   4 × dy's tile        h     2 × B's tile   all   epilogue
//     16-bit  16-bit          16      4 × (128 × 64) 64    4     2 × 2           72   8
//     16-bit  16-bit          32      4 × (128 × 64) 64    8     2 × 4           80   16
//     16-bit  fp32            16      4 × (128 × 64) 64    8     2 × 4           80   8
//     fp32    fp32            16      4 × (128 × 32) 64    8     2 × 2           76   8
//     fp32    fp32            32      4 × (128 × 32) 64    16    2 × 4           88   16
//
// One block fits an SM of 100 KiB, two one of 164 KiB but for the last.
//
// Where rows have adapters of their own (row_adapters), g is scaled and cut row by row. A sum of dB
// that is not a number may have been made so by a row that does not use its rank, whose zero in h
// met what dy holds there: then the warp sums its part of the tile once more without matrix units,
// the rows that use a rank alone.
//
// The blocks behind the slices pack the partner, the other adapter matrix, for lora_gemm.
#pragma once

#include "kernels/ptx/shared_address.cuh"
#include "kernels/rank_grad/products.cuh"
#include "kernels/rank_grad/shapes.h"
#include "kernels/rank_grad/staged_sums.cuh"
#include "kernels/rank_grad/thin_copy.cuh"
#include "kernels/tile/pack.cuh"
#include "kernels/tile/rank_window.cuh"

namespace fused_lora::kernels::rank_grad {

template <typename T_, Arithmetic kArithmetic_, int kRanks_>
struct DownGradTraits {
  using T = T_;
  static constexpr Arithmetic kArithmetic = kArithmetic_;
  static constexpr int kRanks = kRanks_;
  static constexpr int kRowBytes = 128;
  static constexpr int kColumns = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kWarps = kColumns / 8, kThreads = 32 * kWarps;
  static constexpr int kRowFragments = kSliceRows / (16 * kWarps);
  static constexpr int kThin = kThinSteps<kArithmetic>;

  using Low = std::conditional_t<kArithmetic == Arithmetic::kHalf, T, float>;
  using Packed = PackedElement<T, kArithmetic>;
  using LongTile = DepthTile<T, kColumns>;
  using ThinTile = DepthTile<Low, kRanks, kArithmetic == Arithmetic::kHalfMasters>;

  static constexpr int kSteps = kRowBytes / (2 * kChunkBytes);         // g's depth: columns
  static constexpr int kGradSteps = kSliceRows / LongTile::kStepRows;  // dB's depth: rows
  static constexpr int kGradFragments = kRanks / 16;
  static constexpr bool kResident = kGradSteps * kThin * kGradFragments * 4 <= 64;

  static constexpr int kStages = 4;
  static constexpr int kTileBytes = kSliceRows * kRowBytes;
  static constexpr int kLowBytes = kSliceRows * ThinTile::kRowBytes;
  static constexpr int kFactorBytes = kColumns * ThinTile::kRowBytes;
  static constexpr int kSharedBytes = kStages * kTileBytes + kLowBytes + 2 * kFactorBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what a block may have on the smallest devices");
  static_assert(kSliceRows * kRanks * 4 <= kStages * kTileBytes, "the stages hold g's sums");
  static_assert(kPackBytes <= kSharedBytes, "the partner's tile fits as well");
  // Of 16 ranks in 16 bits, two blocks' registers fit an SM, as their shared memory does from 160
  // KiB on.
  static constexpr int kBlocks = kArithmetic == Arithmetic::kHalf && kRanks == 16 ? 2 : 1;
};

struct DownGradParams {
  const void* dy;
  int64_t dy_pitch;  // bytes
  int64_t rows, columns;
  int rank, tiles;
  const RowAdapter* row_adapters;  // or null
  // g:
  const void* factor;
  bool factor_is_half;                // in dy's 16-bit dtype, else fp32
  int64_t factor_row, factor_column;  // strides in bytes
  float down_alpha;
  void* out;     // or null
  void* packed;  // or null
  int packed_rank;
  // dB:
  Thin low;
  float grad_alpha;
  void* grad;  // a partial sum for each slice, fp32; or, of one slice, dB in grad_dtype
  DType grad_dtype;
  int64_t grad_column_stride, grad_rank_stride;
  int64_t grad_slice;  // elements from one partial sum to the next
  bool store_vectors;  // neighbouring ranks together, see store_grad

  int64_t slices;
  PackFactorParams partner;
};

template <typename Traits>
class DownGradBlock {
  using T = typename Traits::T;
  using LongTile = typename Traits::LongTile;
  using ThinTile = typename Traits::ThinTile;
  using GradLeft = LeftFragments<ThinTile, Traits::kGradFragments>;
  using DownRight = RightFragments<ThinTile, Traits::kRanks / 8>;
  static constexpr int kThreads = Traits::kThreads, kColumns = Traits::kColumns;
  static constexpr int kStages = Traits::kStages, kThin = Traits::kThin;
  static constexpr int kElements = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kFactors =
      kColumns * Traits::kRanks / kThreads;  // of B, a thread's of a tile
  static_assert(kThreads % Traits::kRanks == 0, "a thread's elements of B are of one rank");
  using LowFragments = uint32_t[kThin][Traits::kGradFragments][4];

 public:
  __device__ DownGradBlock(const DownGradParams& p, int64_t slice, uint32_t shared)
      : p_(p), first_row_(slice * kSliceRows), shared_(shared), tiles_(p.tiles) {
    rows_ = static_cast<int>(min(p.rows - first_row_, static_cast<int64_t>(kSliceRows)));
    dy_ = static_cast<const char*>(p.dy) + (first_row_ + copy_row()) * p.dy_pitch +
          copy_chunk() * kChunkBytes;
    factor_from_ = static_cast<const char*>(p.factor) + factor_rank() * p.factor_column +
                   factor_column(0) * p.factor_row;
    grad_ = slice * p.grad_slice + grad_column(0) * p.grad_column_stride +
            GradLeft::column(0, 0) * p.grad_rank_stride;
#pragma unroll
    for (int s = 0; s < Traits::kSteps; ++s) {
      const int row = warp() * 16 * Traits::kRowFragments + lane() % 16;
      rows_at_[s] = LongTile::offset(row, 2 * s + lane() / 16);
    }
  }

  __device__ void run() {
    copy_thin<ThinTile, kSliceRows, kThreads>(low_tile(), p_.low, first_row_, rows_, 0);
    load_factor(0);
    store_factor(0);
#pragma unroll 1
    for (int tile = 0; tile < kStages - 1; ++tile) copy(tile);
    if constexpr (Traits::kResident) {
      ptx::cp_async_wait<kStages - 2>();  // h is in the first group
      __syncthreads();
#pragma unroll
      for (int step = 0; step < Traits::kGradSteps; ++step) load_low(low_[step], step);
    }
    const DownRight right;
#pragma unroll 1
    for (int tile = 0; tile < tiles_; ++tile) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      // Into the stage of the tile before this one: every warp is past it.
      copy(tile + kStages - 1);
      if (tile + 1 < tiles_) load_factor(tile + 1);
      const uint32_t dy = long_tile(tile);
      multiply_down(right, dy, factor_tile(tile));
      float grad[Traits::kGradFragments][4] = {};
      multiply_grad(grad, dy);
      if (p_.row_adapters != nullptr) contain(grad, tile);
      store_grad(grad, tile);
      if (tile + 1 < tiles_) store_factor(tile + 1);
    }
    // g's sums go where the stages were. No copy is under way: the groups left are empty.
    __syncthreads();
    if (p_.row_adapters != nullptr) apply_adapters();
    stage_down();
    __syncthreads();
    store_down();
  }

 private:
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ uint32_t long_tile(int tile) const {
    return shared_ + static_cast<uint32_t>(tile) % kStages * Traits::kTileBytes;
  }
  __device__ uint32_t low_tile() const { return shared_ + kStages * Traits::kTileBytes; }
  __device__ uint32_t factor_tile(int tile) const {
    return low_tile() + Traits::kLowBytes + static_cast<uint32_t>(tile) % 2 * Traits::kFactorBytes;
  }

  // Columns of a tile that are there; of a whole one more than it has.
  __device__ int columns_left(int tile) const {
    return static_cast<int>(min(p_.columns - static_cast<int64_t>(tile) * kColumns,
                                static_cast<int64_t>(2 * kColumns)));
  }

  // A tile of dy; nothing beyond the last, but a group of copies all the same. Called for every
  // tile in turn, as load_factor and store_grad are: their addresses move on with each call.
  static constexpr int kCopyStep =
      kThreads / LongTile::kChunks;  // rows from a thread's chunk to its next
  __device__ static int copy_row() { return static_cast<int>(threadIdx.x) / LongTile::kChunks; }
  __device__ static int copy_chunk() { return static_cast<int>(threadIdx.x) % LongTile::kChunks; }
  __device__ void copy(int tile) {
    if (tile < tiles_) {
      const int rows = copy_chunk() * kElements < columns_left(tile) ? rows_ - copy_row() : 0;
#pragma unroll
      for (int i = 0; i < kSliceRows / kCopyStep; ++i) {
        ptx::cp_async_16_or_zeros(
            long_tile(tile) + LongTile::offset(copy_row() + i * kCopyStep, copy_chunk()),
            dy_ + i * (kCopyStep * p_.dy_pitch), i * kCopyStep < rows);
      }
      dy_ += Traits::kRowBytes;
    }
    ptx::cp_async_commit();
  }

  // This thread's elements of a tile of B: one rank of every kFactorStep-th column.
  static constexpr int kFactorStep = kThreads / Traits::kRanks;
  static_assert(kFactorStep % 8 == 0 || !ThinTile::kWide || kThin == 1,
                "interleaved columns repeat every eight places");
  __device__ static int factor_rank() { return static_cast<int>(threadIdx.x) % Traits::kRanks; }
  __device__ static int factor_place(int i) {
    return static_cast<int>(threadIdx.x) / Traits::kRanks + i * kFactorStep;
  }
  __device__ static int factor_column(int i) {
    return ThinTile::depth_at(factor_place(0)) + i * kFactorStep;
  }
  __device__ void load_factor(int tile) {
    const int columns = factor_rank() < p_.rank ? columns_left(tile) - factor_column(0) : 0;
    if constexpr (sizeof(T) == 2) {
      if (p_.factor_is_half) {
        load_factor_as<T>(columns);
      } else {
        load_factor_as<float>(columns);
      }
    } else {
      load_factor_as<float>(columns);
    }
    factor_from_ += kColumns * p_.factor_row;
  }
  template <typename Factor>
  __device__ void load_factor_as(int columns) {
#pragma unroll
    for (int i = 0; i < kFactors; ++i) {
      const char* from = factor_from_ + i * (kFactorStep * p_.factor_row);
      factor_[i] = i * kFactorStep < columns ? to_float(*reinterpret_cast<const Factor*>(from)) : 0;
    }
  }
  __device__ void store_factor(int tile) const {
#pragma unroll
    for (int i = 0; i < kFactors; ++i) {
      const uint32_t at =
          factor_tile(tile) + ThinTile::element_offset(factor_place(i), factor_rank());
      if constexpr (ThinTile::kWide) {
        ptx::store_shared_32(at, __float_as_uint(factor_[i]));
      } else {
        const T value = from_float<T>(factor_[i]);
        ptx::store_shared_16(at, reinterpret_cast<const uint16_t&>(value));
      }
    }
  }

  __device__ void load_low(LowFragments& low, int step) const {
    const GradLeft left(0);
#pragma unroll
    for (int s = 0; s < kThin; ++s) left.load(low[s], low_tile(), step * kThin + s);
  }

  // down_ += dy's tile · B's tile.
  __device__ void multiply_down(const DownRight& right, uint32_t dy, uint32_t factor) {
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      uint32_t a[Traits::kRowFragments][4], b[kThin][Traits::kRanks / 8][2];
#pragma unroll
      for (int i = 0; i < Traits::kRowFragments; ++i) {
        ptx::ldmatrix_x4(a[i], dy + rows_at_[step] + i * 16 * Traits::kRowBytes);
      }
#pragma unroll
      for (int s = 0; s < kThin; ++s) right.load(b[s], factor, step * kThin + s);
      multiply_long_left<T, Traits::kArithmetic>(down_, a, b);
    }
  }

  // grad += hᵀ · this warp's eight columns of dy's tile.
  __device__ void multiply_grad(float (&grad)[Traits::kGradFragments][4], uint32_t dy) {
    if constexpr (sizeof(T) == 2) {
      // One ldmatrix brings 32 rows: two steps.
      const uint32_t at = dy + LongTile::offset(lane(), warp());
#pragma unroll
      for (int step = 0; step < Traits::kGradSteps; step += 2) {
        uint32_t r[4];
        ptx::ldmatrix_x4_transposed(r, at + step * 16 * Traits::kRowBytes);
        multiply_grad_step(grad, {r[0], r[1]}, step);
        multiply_grad_step(grad, {r[2], r[3]}, step + 1);
      }
    } else {
      const uint32_t at = LongTile::element_offset(lane() % 4, 8 * warp() + lane() / 4);
      const uint32_t at4 = LongTile::element_offset(lane() % 4 + 4, 8 * warp() + lane() / 4);
#pragma unroll
      for (int step = 0; step < Traits::kGradSteps; ++step) {
        const uint32_t tile = dy + step * 8 * Traits::kRowBytes;
        multiply_grad_step(grad, {ptx::load_shared_32(tile + at), ptx::load_shared_32(tile + at4)},
                           step);
      }
    }
  }
  __device__ void multiply_grad_step(float (&grad)[Traits::kGradFragments][4],
                                     const uint32_t (&x)[2], int step) {
    if constexpr (Traits::kResident) {
      // What the products make of h would be the same for every tile, too: the pieces of fp32
      // numbers, in twice the registers. They are made anew instead.
      if constexpr (kThin == 2) keep_whole(low_[step]);
      multiply_long_right<T, Traits::kArithmetic>(grad, low_[step], x);
    } else {
      LowFragments low;
      load_low(low, step);
      multiply_long_right<T, Traits::kArithmetic>(grad, low, x);
    }
  }

  // Sums that are numbers are right.
  __device__ void contain(float (&grad)[Traits::kGradFragments][4], int tile) const {
    using Low = typename Traits::Low;
    if (__all_sync(0xffffffffu, are_numbers(grad))) return;
    set_to_zero(grad);
#pragma unroll 1
    for (int64_t row = first_row_; row < first_row_ + rows_; ++row) {
      const RankWindow window = window_of_row(p_.row_adapters, row, p_.rank);
      const T* const dy =
          reinterpret_cast<const T*>(static_cast<const char*>(p_.dy) + row * p_.dy_pitch) +
          static_cast<int64_t>(tile) * kColumns;
      const Low* const low = static_cast<const Low*>(p_.low.data) + row * p_.low.stride;
      float right[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        right[e] = grad_column(e) < columns_left(tile) ? to_float(dy[grad_column(e)]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < Traits::kGradFragments; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int rank = GradLeft::column(i, half);
          if (!window.has(rank)) continue;
          const float left = to_float(low[rank]);
          grad[i][2 * half] += left * right[0];
          grad[i][2 * half + 1] += left * right[1];
        }
      }
    }
  }

  // The compiler may assume nothing of these registers' earlier values.
  __device__ static void keep_whole(LowFragments& low) {
#pragma unroll
    for (int s = 0; s < kThin; ++s) {
#pragma unroll
      for (int i = 0; i < Traits::kGradFragments; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) asm volatile("" : "+r"(low[s][i][r]));
      }
    }
  }

  // Lane group g's ranks are g, g+8, .. of 16-bit h: a store of one rank by eight groups is a
  // sector. Of fp32 h they are 2 or 4 neighbours, which make whole sectors when they are stored
  // together.
  __device__ static int grad_column(int e) { return 8 * warp() + lane() % 4 * 2 + e; }
  __device__ void store_grad(const float (&grad)[Traits::kGradFragments][4], int tile) {
    const int columns = columns_left(tile);
    bool stored = false;
    if constexpr (ThinTile::kWide) {
      if (p_.store_vectors) {
        if (GradLeft::column(0, 0) < p_.rank) store_grad_vectors(grad, columns);
        stored = true;
      }
    }
    if (!stored) {
      if constexpr (sizeof(T) == 2) {
        if (p_.grad_dtype != DType::kFloat32) {
          store_grad_elements(static_cast<T*>(p_.grad) + grad_, grad, columns);
          stored = true;
        }
      }
      if (!stored) store_grad_elements(static_cast<float*>(p_.grad) + grad_, grad, columns);
    }
    grad_ += kColumns * p_.grad_column_stride;
  }
  __device__ void store_grad_vectors(const float (&grad)[Traits::kGradFragments][4],
                                     int columns) const {
    float* const to = static_cast<float*>(p_.grad) + grad_;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (grad_column(e) >= columns) continue;
      const auto value = [&](int i, int half) { return p_.grad_alpha * grad[i][2 * half + e]; };
      if constexpr (Traits::kGradFragments == 1) {
        ptx::store_global_64(to + e * p_.rank, __float_as_uint(value(0, 0)),
                             __float_as_uint(value(0, 1)));
      } else {
        static_assert(Traits::kGradFragments == 2, "four neighbours");
        ptx::store_global_128(to + e * p_.rank,
                              as_bits(value(0, 0), value(0, 1), value(1, 0), value(1, 1)));
      }
    }
  }
  template <typename Out>
  __device__ void store_grad_elements(Out* to, const float (&grad)[Traits::kGradFragments][4],
                                      int columns) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < Traits::kGradFragments; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int rank = GradLeft::column(i, half);
          if ((grad_column(e) < columns) & (rank < p_.rank)) {
            to[e * p_.grad_column_stride + (rank - GradLeft::column(0, 0)) * p_.grad_rank_stride] =
                from_float<Out>(p_.grad_alpha * grad[i][2 * half + e]);
          }
        }
      }
    }
  }

  __device__ static int down_row(int i, int half) {
    return (warp() * Traits::kRowFragments + i) * 16 + 8 * half + lane() / 4;
  }
  // Zeros where a row does not use a rank: selected, because a sum may be infinite there.
  __device__ void apply_adapters() {
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (down_row(i, half) >= rows_) continue;
        const int64_t row = first_row_ + down_row(i, half);
        const RankWindow window = window_of_row(p_.row_adapters, row, p_.rank);
        const float scaling = scaling_of_row(p_.row_adapters, row);
#pragma unroll
        for (int j = 0; j < Traits::kRanks / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& sum = down_[i][j][2 * half + e];
            sum = window.has(DownRight::column(j, e)) ? scaling * sum : 0.0f;
          }
        }
      }
    }
  }
  __device__ void stage_down() const {
#pragma unroll
    for (int i = 0; i < Traits::kRowFragments; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        stage_row<ThinTile>(shared_, down_row(i, half), half, down_[i], p_.down_alpha);
      }
    }
  }

  __device__ void store_down() const {
    using Low = typename Traits::Low;
    if (p_.out != nullptr) {
      Low* out = static_cast<Low*>(p_.out) + first_row_ * p_.rank;
      store_staged<Staged, kThreads>(shared_, rows_, p_.rank, out, p_.rank);
    }
    if (p_.packed != nullptr) store_packed();
  }

  // Each number as often as the format has it, then zeros (stages.h).
  __device__ void store_packed() const {
    using Packed = typename Traits::Packed;
    Packed* to = static_cast<Packed*>(p_.packed) + first_row_ * p_.packed_rank;
    const auto as_part = [](uint32_t bits, int part) {
      const Packed value = packed_part<Packed>(__uint_as_float(bits), part, PackedSide::kLow);
      return __float_as_uint(to_float(value));
    };
    if (p_.rank % 4 == 0) {
      const int quads = p_.packed_rank / 4;
#pragma unroll 1
      for (int i = threadIdx.x; i < rows_ * quads; i += kThreads) {
        const int row = i / quads, depth = i % quads * 4, part = depth / p_.rank;
        uint4 v = {};
        if (part < kPackedParts<Traits::kArithmetic>) {
          v = ptx::load_shared_128(shared_ + Staged::element_offset(row, depth - part * p_.rank));
          v = {as_part(v.x, part), as_part(v.y, part), as_part(v.z, part), as_part(v.w, part)};
        }
        store_four(to + row * static_cast<int64_t>(p_.packed_rank) + depth, v);
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < rows_ * p_.packed_rank; i += kThreads) {
        const int row = i / p_.packed_rank, depth = i % p_.packed_rank, part = depth / p_.rank;
        float value = 0.0f;
        if (part < kPackedParts<Traits::kArithmetic>) {
          const uint32_t bits =
              ptx::load_shared_32(shared_ + Staged::element_offset(row, depth - part * p_.rank));
          value = __uint_as_float(as_part(bits, part));
        }
        to[i] = from_float<Packed>(value);
      }
    }
  }

  using Staged = StagedByRow<Traits::kRanks>;

  const DownGradParams& p_;
  const int64_t first_row_;
  const uint32_t shared_;
  const int tiles_;
  int rows_;
  const char *dy_, *factor_from_;     // this thread's first chunk and number of the next tile
  int64_t grad_;                      // where this lane's first sum of the next tile goes
  uint32_t rows_at_[Traits::kSteps];  // where this lane reads its rows of dy's tile
  float factor_[kFactors];
  float down_[Traits::kRowFragments][Traits::kRanks / 8][4] = {};
  LowFragments low_[Traits::kResident ? Traits::kGradSteps : 1];
};

// Grid: slices, then the partner's blocks.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    down_grad_kernel(const __grid_constant__ DownGradParams params) {
  extern __shared__ __align__(128) char shared[];
  const int64_t block = blockIdx.x;
  if (block >= params.slices) {
    pack_factor<typename Traits::T, Traits::kArithmetic, Traits::kThreads>(
        params.partner, block - params.slices, reinterpret_cast<float*>(shared));
    return;
  }
  DownGradBlock<Traits>(params, block, ptx::shared_address(shared)).run();
}

}  // namespace fused_lora::kernels::rank_grad
