// Few rows of x: dA = gᵀ drop(x) and dB = dyᵀ h are sums of a few outer products. A few rows of
// the output meet all of them in registers and are written once, as they lie: dB, which is asked
// for transposed, by its own rows.
#pragma once

#include "cpu/fused/tiles.h"

namespace fused_lora::cpu::fused {
namespace {

constexpr int64_t kMostOuterRows = 128;
constexpr int kOuterRows = kWidth == 16 ? 8 : 4;
constexpr int kOuterVectors = 3;

// Of more rows the dot products of pairs are the faster.
template <bool kPairs>
inline bool suits_outer(const Product& p) {
  return p.depth <= (kPairs ? 4 : kFewRows) && p.rows <= kMostOuterRows && p.tail_depth == 0 &&
         p.start == nullptr && (p.out.column_stride == 1 || p.out.row_stride == 1) &&
         (p.mask == MaskOn::kNothing || p.mask == MaskOn::kRight);
}

// out(i, j) = alpha · Σ along(m, i) · across(m, j)
struct Outer {
  int64_t depth;
  const float* along;
  int64_t along_stride;  // from m to m+1
  const float* across;   // to whole vectors
  int64_t across_stride;
  float alpha;
  void* out;
  int64_t out_stride;  // from row to row, whose elements are neighbours
  bool wide;           // fp32
};

// Rows i .. i+kRows-1 of the output, columns j .. j+columns-1, at most kVectors vectors of them.
template <int kRows, int kVectors>
void sum_outer(const Outer& outer, int64_t i, int64_t j, int64_t columns) {
  F sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = splat(0.0f);
  }
  const float *along = outer.along + i, *across = outer.across + j;
  for (int64_t m = 0; m < outer.depth; ++m) {
    F vectors[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vectors[v] = load(across + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F row = splat(along[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(row, vectors[v], sums[r][v]);
    }
    along += outer.along_stride;
    across += outer.across_stride;
  }
  const F alpha = splat(outer.alpha);
  const bool whole = columns == kVectors * kWidth;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = (i + r) * outer.out_stride + j;
    float* wide = static_cast<float*>(outer.out) + at;
    uint16_t* narrow = static_cast<uint16_t*>(outer.out) + at;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const F value = sums[r][v] * alpha;
      if (whole && outer.wide) {
        store(wide + v * kWidth, value);
      } else if (whole) {
        store_bf16(narrow + v * kWidth, value);
      } else {
        float values[kWidth];
        store(values, value);
        for (int64_t c = v * kWidth; c < columns && c < (v + 1) * kWidth; ++c) {
          if (outer.wide) wide[c] = values[c - v * kWidth];
          if (!outer.wide) narrow[c] = rounded(values[c - v * kWidth]);
        }
      }
    }
  }
}

template <int kVectors>
void sum_outer_columns(const Outer& outer, int64_t rows, int64_t j, int64_t columns) {
  int64_t i = 0;
  for (; i + kOuterRows <= rows; i += kOuterRows) {
    sum_outer<kOuterRows, kVectors>(outer, i, j, columns);
  }
  for (; i < rows; ++i) sum_outer<1, kVectors>(outer, i, j, columns);
}

// Columns begin .. end-1 of all rows of an operand as fp32, `stride` apart: where they lie, or else
// copied. whole: up to a whole vector.
inline const float* laid_out(const Operand& from, int64_t depth, int64_t begin, int64_t end,
                             const Mask& mask, bool whole, float* copy, int64_t* stride) {
  const int64_t count = end - begin;
  const bool lies = plain(from) && from.column_stride == 1 && from.stored == DType::kFloat32;
  if (lies && mask.bits == nullptr && (!whole || count % kWidth == 0)) {
    *stride = from.row_stride;
    return as_f32(from.data) + begin;
  }
  *stride = parts(count, kWidth) * kWidth;
  copy_rows<false>(from, 0, depth, begin, end, copy, *stride);
  pad_rows(copy, depth, *stride, count);
  if (mask.bits != nullptr) mask_rows<false>(mask, 0, depth, begin, end, copy, *stride);
  return copy;
}

void compute_outer(const Product& p, const Block& block, Scratch& scratch) {
  const bool down = p.out.column_stride != 1;
  const Mask none;
  const Mask& mask = p.mask == MaskOn::kRight ? p.drawn : none;
  int64_t left_stride, right_stride;
  const float* left = laid_out(transposed(p.left), p.depth, block.row, block.row_end, none, down,
                               scratch.accumulators, &left_stride);
  const float* right = laid_out(p.right, p.depth, block.column, block.column_end, mask, !down,
                                scratch.panels, &right_stride);
  const int64_t size = p.out.dtype == DType::kFloat32 ? 4 : 2;
  Outer outer;
  outer.depth = p.depth;
  outer.along = down ? right : left;
  outer.along_stride = down ? right_stride : left_stride;
  outer.across = down ? left : right;
  outer.across_stride = down ? left_stride : right_stride;
  outer.alpha = p.alpha;
  outer.out = static_cast<char*>(p.out.data) +
              size * (block.row * p.out.row_stride + block.column * p.out.column_stride);
  outer.out_stride = down ? p.out.column_stride : p.out.row_stride;
  outer.wide = size == 4;
  int64_t rows = block.row_end - block.row, columns = block.column_end - block.column;
  if (down) {
    const int64_t swapped = rows;
    rows = columns;
    columns = swapped;
  }
  constexpr int64_t kColumns = kOuterVectors * kWidth;
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns) {
    sum_outer_columns<kOuterVectors>(outer, rows, j, kColumns);
  }
  for (; j < columns; j += kWidth) {
    sum_outer_columns<1>(outer, rows, j, smaller(kWidth, columns - j));
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
