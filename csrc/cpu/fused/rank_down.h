// Many rows against few columns: h = x Aᵀ and g = dy B. A row's elements lie side by side, so the
// vectors run along the depth and x is read where it lies; it is met once by every column.
//
//     right    columns × kDownStride    a chunk of every column along the depth, in the second
//     cache sums     kDownRows × kDownColumns    vectors, whose lanes are added at the end of a
//     chunk
#pragma once

#include "cpu/fused/tiles.h"

namespace fused_lora::cpu::fused {
namespace {

constexpr int64_t kMostDownColumns = 128;

inline bool suits_rank_down(const Product& p) {
  return p.rows > kFewRows && p.columns <= kMostDownColumns && p.tail_depth == 0 &&
         p.start == nullptr && p.right.layout == Layout::kStrided && p.mask != MaskOn::kRight;
}

// Rows begin .. end-1 of every column, as units along the depth, and zeros up to whole vectors.
template <bool kPairs>
void pack_columns(const Operand& from, int64_t begin, int64_t end, int64_t columns, float* to) {
  constexpr int kStep = kPairs ? 2 : 1;
  const int64_t units = parts(end - begin, kStep);
  const int64_t padded = parts(units, kWidth) * kWidth;
  const bool across = plain(from) && from.column_stride == 1;
  const int64_t whole = across ? columns / kWidth * kWidth : 0;
  const int64_t whole_units = (end - begin) / (kStep * kWidth) * kWidth;
  for (int64_t c = 0; c < whole; c += kWidth) {
    for (int64_t unit = 0; unit < whole_units; unit += kWidth) {
      F block[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const int64_t at = (begin + kStep * (unit + i)) * from.row_stride + c;
        block[i] = load_units<false>(from, at);
        if constexpr (kPairs) {
          block[i] = interleave(block[i], load_units<false>(from, at + from.row_stride));
        }
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (c + i) * kDownStride + unit, block[i]);
    }
  }
  const Operand rows = transposed(from);
  copy_rows<kPairs>(rows, 0, whole, begin + kStep * whole_units, end, to + whole_units,
                    kDownStride);
  copy_rows<kPairs>(rows, whole, columns - whole, begin, end, to + whole * kDownStride,
                    kDownStride);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t unit = units; unit < padded; ++unit) to[c * kDownStride + unit] = 0.0f;
  }
}

// A few rows of the left operand along a chunk of the depth. Rows past the last are the last again:
// nobody reads their sums.
struct Rows {
  Operand from;
  int64_t at[kDownRows];
  const uint8_t* bits[kDownRows];  // of the mask, from the chunk's begin on
  int64_t ahead;                   // one of those that are read next
};

// sums[i * kDownColumns + j]: row i with column j.
template <bool kPairs, bool kMasked>
inline void multiply_rows(const Rows& rows, const float* const (&columns)[kDownColumns],
                          int64_t units, float* sums) {
  constexpr int kStep = kPairs ? 2 : 1;
  F made[kDownRows * kDownColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kDownRows * kDownColumns; ++i) made[i] = splat(0.0f);
  for (int64_t unit = 0; unit < units; unit += kWidth) {
    prefetch(rows.from, rows.ahead + kStep * unit);
    F row[kDownRows];
#pragma GCC unroll 4
    for (int i = 0; i < kDownRows; ++i) {
      row[i] = load_units<kPairs>(rows.from, rows.at[i] + kStep * unit);
      if constexpr (kMasked && kPairs) row[i] = keep_halves(row[i], rows.bits[i], kStep * unit);
      if constexpr (kMasked && !kPairs) row[i] = keep(row[i], rows.bits[i], unit);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kDownColumns; ++j) {
      const F column = load(columns[j] + unit);
#pragma GCC unroll 4
      for (int i = 0; i < kDownRows; ++i) {
        F& sum = made[i * kDownColumns + j];
        sum = multiply_add_units<kPairs>(row[i], column, sum);
      }
    }
  }
  for (int i = 0; i < kDownRows * kDownColumns; i += kWidth) {
    F group[kWidth];
#pragma GCC unroll 16
    for (int lane = 0; lane < kWidth; ++lane) group[lane] = made[i + lane];
    store(sums + i, sum_lanes(group));
  }
}

template <bool kPairs>
void compute_rank_down(const Product& p, const Block& block, Scratch& scratch) {
  constexpr int64_t kStep = kPairs ? 2 : 1;
  const int64_t rows = block.row_end - block.row, columns = p.columns;
  const int64_t padded = parts(columns, kWidth) * kWidth;
  const bool masked = p.mask == MaskOn::kLeft;
  float* totals = scratch.accumulators;
  for (int64_t i = 0; i < rows * padded; i += kWidth) store(totals + i, splat(0.0f));

  // What does not lie in whole vectors is copied first.
  const bool lies = plain(p.left) && p.left.column_stride == 1;
  const int64_t whole = p.depth / (kStep * kWidth) * (kStep * kWidth);
  int64_t end;
  for (int64_t begin = 0; begin < p.depth; begin = end) {
    end = smaller(begin < whole ? whole : p.depth, begin + kStep * kDownUnits);
    const int64_t units = parts(parts(end - begin, kStep), kWidth) * kWidth;
    const bool in_place = lies && end <= whole;
    pack_columns<kPairs>(p.right, begin, end, columns, scratch.panels);
    for (int64_t row = 0; row < rows; row += kDownRows) {
      const int64_t height = smaller(kDownRows, rows - row);
      Rows few;
      if (in_place) {
        few.from = p.left;
        for (int64_t i = 0; i < kDownRows; ++i) {
          const int64_t used = block.row + row + smaller(i, height - 1);
          few.at[i] = used * p.left.row_stride + begin;
          if (masked) few.bits[i] = p.drawn.bits + used * p.drawn.row_stride + begin / 8;
        }
      } else {
        few.from = {scratch.left, 0, 1, kPairs ? DType::kBFloat16 : DType::kFloat32};
        for (int64_t i = 0; i < kDownRows; ++i) {
          few.at[i] = kStep * smaller(i, height - 1) * kDownStride;
        }
        copy_rows<kPairs>(p.left, block.row + row, height, begin, end, scratch.left, kDownStride);
        if (masked) {
          mask_rows<kPairs>(p.drawn, block.row + row, height, begin, end, scratch.left,
                            kDownStride);
        }
        pad_rows(scratch.left, height, kDownStride, parts(end - begin, kStep));
      }
      for (int64_t c = 0; c < columns; c += kDownColumns) {
        const float* right[kDownColumns];
        for (int64_t j = 0; j < kDownColumns; ++j) {
          right[j] = scratch.panels + smaller(c + j, columns - 1) * kDownStride;
        }
        const int64_t next = smaller(row + kDownRows + c / kDownColumns % kDownRows, rows - 1);
        few.ahead = in_place ? (block.row + next) * p.left.row_stride + begin : 0;
        float sums[kDownRows * kDownColumns];
        if (masked && in_place) {
          multiply_rows<kPairs, true>(few, right, units, sums);
        } else {
          multiply_rows<kPairs, false>(few, right, units, sums);
        }
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t j = 0; j < smaller(kDownColumns, columns - c); ++j) {
            totals[(row + i) * padded + c + j] += sums[i * kDownColumns + j];
          }
        }
      }
    }
  }
  finish(p, totals, padded / kWidth, block.row, rows, 0, columns);
}

}  // namespace
}  // namespace fused_lora::cpu::fused
