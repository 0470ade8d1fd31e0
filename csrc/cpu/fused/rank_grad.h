// Few rows against many columns over a long depth: dA = gᵀ x and dBᵀ = hᵀ dy. Rows of x are read
// where they lie, a strip of a few vectors at a time, and meet every row of gᵀ.
#pragma once

#include "cpu/fused/tiles.h"

namespace fused_lora::cpu::fused {
namespace {

constexpr int64_t kMostGradRows = 128;

inline bool suits_rank_grad(const Product& p) {
  return p.rows <= kMostGradRows && p.tail_depth == 0 && p.start == nullptr && plain(p.right) &&
         p.right.column_stride == 1 && p.left.row_stride == 1 && plain(p.left) &&
         (p.mask == MaskOn::kNothing || p.mask == MaskOn::kRight);
}

// Columns begin .. end-1 of `left`, whose rows are neighbours, as units: to[unit * stride + row].
template <bool kPairs>
void copy_columns(const Operand& left, int64_t rows, int64_t begin, int64_t end, float* to,
                  int64_t stride) {
  constexpr int kStep = kPairs ? 2 : 1;
  for (int64_t at = begin; at < end; at += kStep) {
    const int64_t place = at * left.column_stride;
    int64_t i = 0;
    for (; i + kWidth <= rows; i += kWidth) {
      F unit = load_units<false>(left, place + i);
      if constexpr (kPairs) {
        const int64_t next = place + left.column_stride + i;
        unit = interleave(unit, at + 1 < end ? load_units<false>(left, next) : splat(0.0f));
      }
      store(to + i, unit);
    }
    for (; i < rows; ++i) {
      const float first = element(left, i, at);
      to[i] = kPairs ? pair(first, at + 1 < end ? element(left, i, at + 1) : 0.0f) : first;
    }
    for (; i % kGradRows != 0; ++i) to[i] = 0.0f;
    to += stride;
  }
}

// A strip of the right operand: rows from `row` on, kVectors vectors of columns from `column` on.
template <int kVectors, bool kPairs, bool kMasked>
struct Strip {
  const Operand& right;
  const Mask& mask;
  int64_t row, row_end, column;

  F load_row(int64_t at_row, int64_t v) const {
    const F value = load_units<false>(right, at_row * right.row_stride + column + v * kWidth);
    if constexpr (kMasked) {
      return keep(value, mask.bits + at_row * mask.row_stride, column + v * kWidth);
    }
    return value;
  }

  F load_halves(int64_t at_row) const {
    if (at_row >= row_end) return splat(0.0f);
    const F value = load_units<true>(right, at_row * right.row_stride + column);
    if constexpr (kMasked) {
      return keep_halves(value, mask.bits + at_row * mask.row_stride, column);
    }
    return value;
  }

  void load_unit(int64_t unit, F (&columns)[kVectors]) const {
    if constexpr (kPairs && kVectors == 2) {
      zip(load_halves(row + 2 * unit), load_halves(row + 2 * unit + 1), columns);
    } else if constexpr (kPairs) {
      const int64_t next = row + 2 * unit + 1;
      columns[0] =
          interleave(load_row(next - 1, 0), next < row_end ? load_row(next, 0) : splat(0.0f));
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = load_row(row + unit, v);
    }
  }

  // The same rows of the strip after this: each lies in a page of its own.
  void expect_next(int64_t unit) const {
    constexpr int kStep = kPairs ? 2 : 1;
#pragma GCC unroll 2
    for (int i = 0; i < kStep; ++i) {
      const int64_t at = (row + kStep * unit + i) * right.row_stride + column + kVectors * kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v += kStep) prefetch(right, at + v * kWidth);
    }
  }
};

// Adds `units` of the depth to kGradRows rows of a strip's totals.
template <int kVectors, bool kPairs, bool kMasked>
void add_strip(const Strip<kVectors, kPairs, kMasked>& strip, const float* left, int64_t stride,
               int64_t units, bool first, float* totals, int64_t totals_stride) {
  F sums[kGradRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kGradRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = splat(0.0f);
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    if (first) strip.expect_next(unit);
    F columns[kVectors];
    strip.load_unit(unit, columns);
#pragma GCC unroll 8
    for (int i = 0; i < kGradRows; ++i) {
      const F row = splat(left[unit * stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = multiply_add_units<kPairs>(row, columns[v], sums[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGradRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* total = totals + i * totals_stride + v * kWidth;
      store(total, load(total) + sums[i][v]);
    }
  }
}

template <bool kPairs, bool kMasked>
void compute_rank_grad(const Product& p, const Block& block, Scratch& scratch) {
  constexpr int64_t kStep = kPairs ? 2 : 1;
  constexpr int kVectors = kPairs ? 2 : kGradVectors;
  const int64_t columns = (block.column_end - block.column) / kWidth * kWidth;
  const int64_t rows = p.rows, padded_rows = parts(rows, kGradRows) * kGradRows;
  float *totals = scratch.accumulators, *left = scratch.panels;
  for (int64_t i = 0; i < padded_rows * columns; i += kWidth) store(totals + i, splat(0.0f));

  const auto add = [&](const auto& strip, int64_t units, int64_t c) {
    for (int64_t i = 0; i < padded_rows; i += kGradRows) {
      add_strip(strip, left + i, padded_rows, units, i == 0, totals + i * columns + c, columns);
    }
  };
  for (int64_t begin = 0; begin < p.depth; begin += kStep * kSumUnits) {
    const int64_t end = smaller(p.depth, begin + kStep * kSumUnits);
    const int64_t units = parts(end - begin, kStep);
    copy_columns<kPairs>(p.left, rows, begin, end, left, padded_rows);
    int64_t c = 0;
    for (; c + kVectors * kWidth <= columns; c += kVectors * kWidth) {
      add(Strip<kVectors, kPairs, kMasked>{p.right, p.drawn, begin, end, block.column + c}, units,
          c);
    }
    for (; c < columns; c += kWidth) {
      add(Strip<1, kPairs, kMasked>{p.right, p.drawn, begin, end, block.column + c}, units, c);
    }
  }
  finish(p, totals, columns / kWidth, 0, rows, block.column, columns);
  // What is left of less than a vector is another block.
  compute_block<kPairs, kPairs>(p, {0, rows, block.column + columns, block.column_end}, scratch);
}

}  // namespace
}  // namespace fused_lora::cpu::fused
