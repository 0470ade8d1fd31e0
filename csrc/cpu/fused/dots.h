// Few rows against columns of `right` that are contiguous in the depth, as those of Wᵀ are for
// y = x Wᵀ: laying W out would cost more than meeting it once, so it is read where it lies.
//
// Memory is read at its full speed only in long runs, several of them side by side: so a few
// columns at a time meet all rows from the depth's beginning to its end, and the next ones are
// called into the second cache meanwhile.
#pragma once

#include "cpu/fused/tiles.h"

namespace fused_lora::cpu::fused {
namespace {

// Columns whose units lie side by side, `stride` bytes apart.
struct Columns {
  const char* data;
  int64_t stride, count, units;
  bool narrow;  // elements of bf16, alone or in pairs
};

// A group of columns, and what it meets.
struct Dots {
  const float* left;  // kDotStride apart, zeros to whole vectors
  Columns right;
  const float* tail_left;  // kTailStride apart, zeros to whole vectors
  Columns tail_right;
  float* sums;  // of the rows, `padded` apart
  int64_t padded;
};

// A vector of units at a column's place, kNarrow: of bf16.
template <bool kPairs, bool kNarrow>
inline F load_column(const char* at) {
  if constexpr (kNarrow && !kPairs) return load_bf16(reinterpret_cast<const uint16_t*>(at));
  return load(reinterpret_cast<const float*>(at));
}

template <int kRows, int kColumns, bool kPairs, bool kNarrow>
inline __attribute__((always_inline)) void accumulate_dots(F (&sums)[kDotSums], const float* left,
                                                           int64_t stride, const Columns& right,
                                                           bool first_rows) {
  constexpr int64_t kSize = kNarrow && !kPairs ? 2 : 4;
  // Columns past the last are the last again: nobody reads their sums.
  const char* columns[kColumns];
  for (int64_t j = 0; j < kColumns; ++j) {
    columns[j] = right.data + smaller(j, right.count - 1) * right.stride;
  }
  const int64_t ahead = kColumns * right.stride;
  const auto meet = [&](int64_t unit, const auto& read) __attribute__((always_inline)) {
    F rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i] = load(left + i * stride + unit);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const F column = read(columns[j] + kSize * unit);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        F& sum = sums[i * kColumns + j];
        sum = multiply_add_units<kPairs>(rows[i], column, sum);
      }
    }
  };
  const int64_t whole = right.units / kWidth * kWidth;
  if (first_rows) {
    for (int64_t unit = 0; unit < whole; unit += kWidth) {
      meet(unit, [&](const char* at) __attribute__((always_inline)) {
        prefetch_far(at + ahead);
        return load_column<kPairs, kNarrow>(at);
      });
    }
  } else {
    for (int64_t unit = 0; unit < whole; unit += kWidth) {
      meet(unit, [&](const char* at)
                     __attribute__((always_inline)) { return load_column<kPairs, kNarrow>(at); });
    }
  }
  if (whole < right.units) {
    meet(whole, [&](const char* at) __attribute__((always_inline)) {
      return load_first(reinterpret_cast<const float*>(at), right.units - whole);
    });
  }
}

// Adds kRows×kColumns dots to the sums of rows row .. row+kRows-1.
template <int kRows, int kColumns, bool kPairs, bool kNarrow, bool kTailPairs>
void compute_dots(const Dots& dots, int64_t row) {
  F sums[kDotSums];
#pragma GCC unroll 16
  for (int i = 0; i < kDotSums; ++i) sums[i] = splat(0.0f);
  if (dots.tail_right.units > 0) {
    accumulate_dots<kRows, kColumns, kTailPairs, kTailPairs>(
        sums, dots.tail_left + row * kTailStride, kTailStride, dots.tail_right, false);
  }
  accumulate_dots<kRows, kColumns, kPairs, kNarrow>(sums, dots.left + row * kDotStride, kDotStride,
                                                    dots.right, row == 0);
  float made[kDotSums];
#pragma GCC unroll 2
  for (int first = 0; first < kRows * kColumns; first += kWidth) {
    F square[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) square[i] = sums[first + i];
    store(made + first, sum_lanes(square));
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    float* to = dots.sums + (row + i) * dots.padded;
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) to[j] += made[i * kColumns + j];
  }
}

// All rows, in groups of nearly the same height, against a group of columns.
template <int kColumns, bool kPairs, bool kNarrow, bool kTailPairs>
void compute_rows_of_dots(const Dots& dots, int64_t rows) {
  constexpr int kHeight = kDotSums / kColumns;
  const int64_t groups = parts(rows, kHeight);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = group * rows / groups, height = (group + 1) * rows / groups - row;
    if constexpr (kHeight >= 4) {
      if (height == 4) compute_dots<4, kColumns, kPairs, kNarrow, kTailPairs>(dots, row);
      if (height == 3) compute_dots<3, kColumns, kPairs, kNarrow, kTailPairs>(dots, row);
    }
    if constexpr (kHeight >= 2) {
      if (height == 2) compute_dots<2, kColumns, kPairs, kNarrow, kTailPairs>(dots, row);
    }
    if (height == 1) compute_dots<1, kColumns, kPairs, kNarrow, kTailPairs>(dots, row);
  }
}

// As many columns at once as leave registers for the sums.
inline int64_t dot_columns(int64_t rows) {
  return rows == 1 ? kDotSums : rows == 2 ? kDotSums / 2 : kDotSums / 4;
}

template <bool kPairs, bool kNarrow, bool kTailPairs>
void compute_group_of_dots(const Dots& dots, int64_t rows) {
  if (rows == 1) {
    compute_rows_of_dots<kDotSums, kPairs, kNarrow, kTailPairs>(dots, rows);
  } else if (rows == 2) {
    compute_rows_of_dots<kDotSums / 2, kPairs, kNarrow, kTailPairs>(dots, rows);
  } else {
    compute_rows_of_dots<kDotSums / 4, kPairs, kNarrow, kTailPairs>(dots, rows);
  }
}

inline bool suits_dots(const Product& p) {
  return p.rows <= kFewRows && p.right.layout == Layout::kStrided && p.right.row_stride == 1 &&
         p.tail_depth <= kTailUnits && p.mask != MaskOn::kTail && p.mask != MaskOn::kRight;
}

// Columns column .. column+count-1 from depth begin, an even one, to end: where they lie, or else
// copied as units. wide: no single elements of bf16, neither.
template <bool kPairs>
Columns columns_of(const Operand& from, int64_t begin, int64_t end, int64_t column, int64_t count,
                   bool wide, float* copy, int64_t stride) {
  constexpr int kStep = kPairs ? 2 : 1;
  const bool narrow = from.stored == DType::kBFloat16;
  const bool whole = kPairs    ? (end - begin) % 2 == 0
                     : !narrow ? true
                               : !wide && (end - begin) % kWidth == 0;
  const int64_t units = parts(end - begin, kStep);
  if (whole && plain(from) && from.row_stride == 1) {
    const int64_t size = narrow ? 2 : 4;
    return {static_cast<const char*>(from.data) + size * (begin + column * from.column_stride),
            size * from.column_stride, count, units, narrow};
  }
  copy_rows<kPairs>(transposed(from), column, count, begin, end, copy, stride);
  return {reinterpret_cast<const char*>(copy), 4 * stride, count, units, kPairs};
}

template <bool kPairs, bool kTailPairs>
void compute_block_of_dots(const Product& p, const Block& block, Scratch& scratch) {
  constexpr int kStep = kPairs ? 2 : 1;
  const int64_t rows = block.row_end - block.row, columns = block.column_end - block.column;
  const int64_t padded = parts(columns, kDotSums) * kDotSums;
  const int64_t width = dot_columns(rows);
  float* sums = scratch.accumulators;
  const Operand start = {p.start, 0, 1, p.start_dtype};
  if (p.start_row_stride != 0) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = start_of(p, block.row + i, block.column);
      for (int64_t c = 0; c < padded; c += kWidth) store(sums + i * padded + c, load(from + c));
    }
  } else {
    for (int64_t c = 0; c < padded; ++c) {
      sums[c] = p.start != nullptr && c < columns ? element(start, 0, block.column + c) : 0.0f;
      for (int64_t i = 1; i < rows; ++i) sums[i * padded + c] = sums[c];
    }
  }
  Dots dots;
  dots.left = scratch.dot_left;
  dots.tail_left = scratch.dot_tail_left;
  dots.padded = padded;
  copy_rows<kTailPairs>(p.tail_left, block.row, rows, 0, p.tail_depth, scratch.dot_tail_left,
                        kTailStride);
  pad_rows(scratch.dot_tail_left, rows, kTailStride, parts(p.tail_depth, kTailPairs ? 2 : 1));

  for (int64_t begin = 0; begin < larger(1, p.depth); begin += kStep * kDotUnits) {
    const int64_t end = smaller(p.depth, begin + kStep * kDotUnits);
    const int64_t tail_end = begin == 0 ? p.tail_depth : 0;
    copy_rows<kPairs>(p.left, block.row, rows, begin, end, scratch.dot_left, kDotStride);
    if (p.mask == MaskOn::kLeft) {
      mask_rows<kPairs>(p.drawn, block.row, rows, begin, end, scratch.dot_left, kDotStride);
    }
    pad_rows(scratch.dot_left, rows, kDotStride, parts(end - begin, kStep));
    for (int64_t c = 0; c < columns; c += width) {
      const int64_t count = smaller(width, columns - c);
      const int64_t column = block.column + c;
      dots.sums = sums + c;
      dots.right =
          columns_of<kPairs>(p.right, begin, end, column, count, false, scratch.panels, kDotStride);
      dots.tail_right = columns_of<kTailPairs>(p.tail_right, 0, tail_end, column, count, true,
                                               scratch.dot_tail_right, kTailStride);
      if (kPairs || !dots.right.narrow) {
        compute_group_of_dots<kPairs, kPairs, kTailPairs>(dots, rows);
      } else {
        compute_group_of_dots<kPairs, true, kTailPairs>(dots, rows);
      }
    }
  }
  finish(p, sums, padded / kWidth, block.row, rows, block.column, columns);
}

}  // namespace
}  // namespace fused_lora::cpu::fused
