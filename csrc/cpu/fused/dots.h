// Few rows: laying W out would cost more than meeting it once, so it is read where it lies.
#pragma once

#include "cpu/fused/tiles.h"

namespace fused_lora::cpu::fused {
namespace {

// The sums of the lanes of kDotSums vectors.
inline void add_lanes(F (&vectors)[kDotSums], float* sums) {
  for (int first = 0; first < kDotSums; first += kWidth) {
    F square[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) square[i] = vectors[first + i];
    transpose(square);
#pragma GCC unroll 4
    for (int step = kWidth / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < step; ++i) square[i] = square[i] + square[i + step];
    }
    store(sums + first, square[0]);
  }
}

template <bool kPairs>
inline F multiply_add_units(F a, F b, F c) {
  if constexpr (kPairs) return multiply_add_pairs(a, b, c);
  return multiply_add(a, b, c);
}

// What dots of few rows are made of: rows of `left`, and columns of `right` that are contiguous in
// the depth. The rest of the depth, less than a vector, lies in `rest`, padded with zeros.
struct Dots {
  const float* left;  // kDotStride apart
  int64_t row, last_row;
  const Operand* right;
  int64_t begin, column, last_column;
  int64_t units;  // in whole vectors
  const float* rest;
  bool has_rest;
  const float* tail_left;   // kTailStride apart
  const float* tail_right;  // so are a column's
  int64_t tail_units;       // in whole vectors, padded
};

// sums[i * columns + j]: row i with column j, kDotSums of them. Rows and columns past the last are
// the last again: nobody reads their sums.
template <int kRows, bool kPairs, bool kTailPairs>
void compute_dots(const Dots& dots, int group, float* out) {
  constexpr int kColumns = kDotSums / kRows;
  constexpr int kStep = kPairs ? 2 : 1;
  F sums[kDotSums];
#pragma GCC unroll 16
  for (int i = 0; i < kDotSums; ++i) sums[i] = splat(0.0f);
  const float *rows[kRows], *tail_rows[kRows];
  int64_t columns[kColumns];
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = smaller(dots.row + i, dots.last_row);
    rows[i] = dots.left + row * kDotStride;
    tail_rows[i] = dots.tail_left + row * kTailStride;
  }
  const int64_t first = group * kColumns;
  for (int j = 0; j < kColumns; ++j) {
    const int64_t column = smaller(dots.column + first + j, dots.last_column);
    columns[j] = column * dots.right->column_stride + dots.begin;
  }
  for (int64_t unit = 0; unit < dots.tail_units; unit += kWidth) {
    for (int j = 0; j < kColumns; ++j) {
      const F column = load(dots.tail_right + (first + j) * kTailStride + unit);
      for (int i = 0; i < kRows; ++i) {
        F& sum = sums[i * kColumns + j];
        sum = multiply_add_units<kTailPairs>(load(tail_rows[i] + unit), column, sum);
      }
    }
  }
  for (int64_t unit = 0; unit < dots.units; unit += kWidth) {
    F row[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) row[i] = load(rows[i] + unit);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const F column = load_units<kPairs>(*dots.right, columns[j] + kStep * unit);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        F& sum = sums[i * kColumns + j];
        sum = multiply_add_units<kPairs>(row[i], column, sum);
      }
    }
  }
  if (dots.has_rest) {
    for (int j = 0; j < kColumns; ++j) {
      const F column = load(dots.rest + (first + j) * kWidth);
      for (int i = 0; i < kRows; ++i) {
        F& sum = sums[i * kColumns + j];
        sum = multiply_add_units<kPairs>(load(rows[i] + dots.units), column, sum);
      }
    }
  }
  add_lanes(sums, out);
}

inline Operand transposed(Operand operand) {
  const int64_t stride = operand.row_stride;
  operand.row_stride = operand.column_stride;
  operand.column_stride = stride;
  return operand;
}

// Zeros from a row's units to the next whole vector.
inline void pad_rows(float* units, int64_t rows, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t unit = count; unit % kWidth != 0; ++unit) units[i * stride + unit] = 0.0f;
  }
}

inline bool suits_dots(const Product& p, const Block& block) {
  return block.row_end - block.row <= kFewRows && plain(p.right) && p.right.row_stride == 1 &&
         p.tail_depth <= kTailUnits && p.mask != MaskOn::kTail && p.mask != MaskOn::kRight;
}

template <bool kPairs, bool kTailPairs>
void compute_block_of_dots(const Product& p, const Block& block, Scratch& scratch) {
  constexpr int kStep = kPairs ? 2 : 1;
  const int64_t rows = block.row_end - block.row, columns = block.column_end - block.column;
  const int64_t padded = parts(columns, kWidth) * kWidth;
  const int64_t tail_units = parts(p.tail_depth, kTailPairs ? 2 : 1);
  float* sums = scratch.accumulators;
  const Operand start = {p.start, 0, 1, p.start_dtype, p.start_dtype};
  for (int64_t c = 0; c < padded; ++c) {
    sums[c] = p.start != nullptr && c < columns ? element(start, 0, block.column + c) : 0.0f;
    for (int64_t i = 1; i < rows; ++i) sums[i * padded + c] = sums[c];
  }
  copy_rows<kTailPairs>(p.tail_left, block.row, rows, 0, p.tail_depth, scratch.dot_tail_left,
                        kTailStride);
  pad_rows(scratch.dot_tail_left, rows, kTailStride, tail_units);

  for (int64_t begin = 0; begin < larger(1, p.depth); begin += kStep * kDotUnits) {
    const int64_t end = smaller(p.depth, begin + kStep * kDotUnits);
    const int64_t units = parts(end - begin, kStep);
    const int64_t whole = (end - begin) / (kStep * kWidth) * kWidth;
    copy_rows<kPairs>(p.left, block.row, rows, begin, end, scratch.dot_left, kDotStride);
    if (p.mask == MaskOn::kLeft) {
      mask_rows<kPairs>(p.dropout, block.row, rows, begin, end, scratch.dot_left, kDotStride,
                        scratch.left_bits);
    }
    pad_rows(scratch.dot_left, rows, kDotStride, units);
    for (int64_t c = 0; c < columns; c += kDotSums) {
      const int64_t count = smaller(kDotSums, columns - c);
      Dots dots;
      dots.left = scratch.dot_left;
      dots.last_row = rows - 1;
      dots.right = &p.right;
      dots.begin = begin;
      dots.column = block.column + c;
      dots.last_column = block.column_end - 1;
      dots.units = whole;
      dots.has_rest = units > whole;
      dots.rest = scratch.dot_rest;
      if (dots.has_rest) {
        copy_rows<kPairs>(transposed(p.right), block.column + c, count, begin + kStep * whole, end,
                          scratch.dot_rest, kWidth);
        pad_rows(scratch.dot_rest, count, kWidth, units - whole);
      }
      dots.tail_left = scratch.dot_tail_left;
      dots.tail_right = scratch.dot_tail_right;
      dots.tail_units = begin == 0 ? parts(tail_units, kWidth) * kWidth : 0;
      if (dots.tail_units > 0) {
        copy_rows<kTailPairs>(transposed(p.tail_right), block.column + c, count, 0, p.tail_depth,
                              scratch.dot_tail_right, kTailStride);
        pad_rows(scratch.dot_tail_right, count, kTailStride, tail_units);
      }
      int64_t height;
      for (int64_t row = 0; row < rows; row += height) {
        height = rows - row >= 3 ? 4 : rows - row;
        dots.row = row;
        const int64_t width = kDotSums / height;
        for (int64_t group = 0; group * width < count; ++group) {
          float made[kDotSums];
          const int g = static_cast<int>(group);
          if (height == 1) {
            compute_dots<1, kPairs, kTailPairs>(dots, g, made);
          } else if (height == 2) {
            compute_dots<2, kPairs, kTailPairs>(dots, g, made);
          } else {
            compute_dots<4, kPairs, kTailPairs>(dots, g, made);
          }
          for (int64_t i = 0; i < smaller(height, rows - row); ++i) {
            for (int64_t j = 0; j < smaller(width, count - group * width); ++j) {
              sums[(row + i) * padded + c + group * width + j] += made[i * width + j];
            }
          }
        }
      }
    }
  }
  finish(p, sums, padded / kWidth, block.row, rows, block.column, columns);
}

}  // namespace
}  // namespace fused_lora::cpu::fused
