// The launches that a call is made of. Internal to csrc/kernels: forward.cpp and backward.cpp plan
// them and run them, one folder implements each.
//
// Two kinds of kernel serve each stage. The tensor-core kernels take rows of 16-byte chunks; the
// plain kernels (plain/) take any stride and alignment, and fp32 arithmetic.
#pragma once

#include "kernels/lora_linear.h"

namespace fused_lora::kernels {

// The low-rank operands as lora_gemm reads them: more tiles of its reduction, zero-padded, dense.
// Its depth is the rank, for kHalfMasters three times the rank: products of fp32 numbers by three
// products of bf16 ones. With v = high + low + (at most 2^-17 |v|), high = bf16(v), low = bf16(v -
// high), the left operand holds [high | high | low] and the right one [high | low | high].
//
// kHalf: elements of dtype. kHalfMasters: bf16, whose exponent is fp32's, beside fp16 too. kTf32:
// fp32.
constexpr int kPackedTileBytes = 64;  // the depth of lora_gemm's tile; see lora_gemm/lora_gemm.cuh

inline int64_t packed_element_bytes(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kTf32 ? 4 : 2;
}
constexpr int packed_parts(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kHalfMasters ? 3 : 1;
}
inline int64_t packed_rank(Arithmetic arithmetic, int64_t rank) {
  const int64_t depth = packed_parts(arithmetic) * rank;
  const int64_t tile = kPackedTileBytes / packed_element_bytes(arithmetic);
  return (depth + tile - 1) / tile * tile;
}

// Stages that one launch takes at most: of calls that share their x, and of both gradients of each.
constexpr int kMostCalls = 4;
constexpr int kMostGrads = 2 * kMostCalls;

// Elements from one row to the next, where 0 stands for rows that lie dense.
inline int64_t stride_or_dense(int64_t stride, int64_t row_length) {
  return stride == 0 ? row_length : stride;
}

// Writes the right operand of the low-rank product: B for y, A for dx. The launch before lora_gemm
// does it beside its own work.
struct PackFactor {
  MatrixView factor;  // extent×rank: element (e, j)
  DType factor_dtype = DType::kFloat32;
  int64_t extent = 0;  // N for y, K for dx
  int64_t rank = 0;
  // Where lora_gemm's weight has its reduction contiguous so has this: extent×packed_rank. Else it
  // is packed_rank×extent, rows of `stride` elements, a multiple of 16 bytes, the gap never read.
  bool depth_contiguous = true;
  int64_t stride = 0;      // of packed's rows
  void* packed = nullptr;  // null: nothing to do
};

// out = alpha · drop(X) · F        X: rows×columns   F: columns×rank   out: rows×rank
// h from x and Aᵀ, g from dy and B. With row_adapters a row is scaled by its adapter's scaling too,
// and zero outside of its ranks.
struct RankDown {
  Arithmetic arithmetic = Arithmetic::kHalf;
  DType dtype = DType::kFloat32;         // of X
  DType factor_dtype = DType::kFloat32;  // of F; rounded to dtype for kHalf
  int64_t rows = 0, columns = 0, rank = 0;
  MatrixView x;
  MatrixView factor;  // columns×rank: element (c, j)
  float alpha = 1.0f;
  const RowAdapter* row_adapters = nullptr;  // rows, in device memory; or null
  Dropout dropout;                           // its scale is in alpha already
  void* out = nullptr;                       // in rank_dtype; or null
  int64_t out_stride = 0;                    // 0: dense
  void* packed = nullptr;  // rows×packed_rank, dense: lora_gemm's left operand; or null
  PackFactor partner;
};

// out = mask ∘ (low · factor) · scale + X · W + bias + addend
// y from h, B, x, Wᵀ and b; dx from g, A, dy and W under x's mask. With a depth of zero X and W are
// not there, and out is the addend and the low-rank product. With row_adapters `low` is zero
// outside of a row's ranks, and what `factor` holds there does not reach the row.
struct LoraGemm {
  Arithmetic arithmetic = Arithmetic::kHalf;
  DType dtype = DType::kFloat32;  // of X, W, bias, addend and out
  int64_t rows = 0, depth = 0, columns = 0, rank = 0;
  MatrixView x;       // rows×depth
  MatrixView weight;  // depth×columns: element (d, c)
  const void* bias = nullptr;
  const RowAdapter* row_adapters = nullptr;  // rows, in device memory; or null
  Dropout dropout;
  const void* addend = nullptr;  // rows×columns, rows addend_stride apart; out itself, or apart
  int64_t addend_stride = 0;
  void* out = nullptr;  // rows×columns, rows out_stride apart
  int64_t out_stride = 0;
  // Tensor-core kernels:
  const void* packed_low = nullptr;     // RankDown::packed
  const void* packed_factor = nullptr;  // PackFactor::packed
  int64_t packed_factor_stride = 0;
  // Plain kernels:
  const void* low = nullptr;  // rows×rank, in the rank dtype
  int64_t low_stride = 0;     // 0: dense
  MatrixView factor;          // rank×columns: element (j, c)
  DType factor_dtype = DType::kFloat32;
};

// out[c][j] = alpha · Σ_m drop(X)[m][c] · low[m][j]        X: rows×columns   low: rows×rank
// dB (columns×rank) from dy and h; dA, written transposed (rank×columns), from x and g. With
// row_adapters `low` is zero outside of a row's ranks, and what X holds of the row does not reach
// out's other ranks.
struct RankGrad {
  Arithmetic arithmetic = Arithmetic::kHalf;
  DType dtype = DType::kFloat32;  // of X
  int64_t rows = 0, columns = 0, rank = 0;
  MatrixView x;
  const void* low = nullptr;  // in the rank dtype
  int64_t low_stride = 0;     // 0: dense
  float alpha = 1.0f;
  const RowAdapter* row_adapters = nullptr;  // rows, in device memory; or null
  Dropout dropout;                           // its scale is in alpha already
  bool transposed = false;
  // The rows are split in `splits` equal shares of whole tiles. With one the result goes to `out`,
  // in out_dtype; with more, share s writes its fp32 sums at partials + s · columns · rank, in
  // out's layout, and Partials adds them.
  int splits = 1;
  float* partials = nullptr;
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
};

// RankDown on dy (g) and RankGrad on dy (dB) by one read of dy. Share s of the rows writes its sums
// of dB at grad.partials + s · columns · rank.
struct RankDownGrad {
  RankDown down;
  RankGrad grad;  // the same X as down's, no dropout
};

// out[i] = Σ_s partials[s · count + i], in the order of s.
struct Partials {
  const float* partials = nullptr;
  int splits = 0;
  int64_t count = 0;
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
};
}  // namespace fused_lora::kernels
