// Very few rows against columns that are contiguous across: the sums of a wide strip of columns are
// registers, and every row of right is read once.
#pragma once

#include "cpu/fused/dots.h"

namespace fused_lora::cpu::fused {
namespace {

constexpr int64_t kVeryFewRows = 4;

template <int kRows>
constexpr int kStripVectors = kDotSums / (kRows == 3 ? 4 : kRows);

template <int kRows, int kVectors, bool kPairs>
inline __attribute__((always_inline)) void accumulate_across(F (&sums)[kRows][kVectors],
                                                             const float* left, int64_t stride,
                                                             const Operand& right, int64_t begin,
                                                             int64_t end, int64_t column) {
  constexpr int kStep = kPairs ? 2 : 1;
  for (int64_t row = begin; row < end; row += kStep) {
    const int64_t at = row * right.row_stride + column;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      prefetch(right, at + kRowsAhead * right.row_stride + v * kWidth);
      F columns = load_units<false>(right, at + v * kWidth);
      if constexpr (kPairs) {
        const int64_t next = at + right.row_stride + v * kWidth;
        prefetch(right, next + kRowsAhead * right.row_stride);
        columns = interleave(columns, row + 1 < end ? load_units<false>(right, next) : splat(0.0f));
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        sums[i][v] = multiply_add_units<kPairs>(splat(left[i * stride]), columns, sums[i][v]);
      }
    }
    ++left;
  }
}

template <int kRows, int kVectors, bool kPairs, bool kTailPairs>
void compute_strip(const Product& p, int64_t column, int64_t begin, int64_t end,
                   const uint8_t* bits, int64_t bits_column, const Scratch& scratch, float* totals,
                   int64_t padded) {
  F sums[kRows][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[i][v] = splat(0.0f);
  }
  const auto add_up = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        float* total = totals + i * padded + v * kWidth;
        store(total, load(total) + sums[i][v]);
        sums[i][v] = splat(0.0f);
      }
    }
  };
  if (begin == 0 && p.tail_depth > 0) {
    accumulate_across<kRows, kVectors, kTailPairs>(sums, scratch.tail_left, kTailStride,
                                                   p.tail_right, 0, p.tail_depth, column);
    if (bits != nullptr) {
      const F scale = splat(p.tail_scale);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          sums[i][v] = keep(sums[i][v] * scale, bits + i * kBitsStride, bits_column + v * kWidth);
        }
      }
    }
    add_up();
  }
  constexpr int64_t kRun = kPairs ? 2 * kUnits : kSumUnits;
  for (int64_t row = begin; row < end; row += kRun) {
    accumulate_across<kRows, kVectors, kPairs>(
        sums, scratch.left + (row - begin) / (kPairs ? 2 : 1), kLeftStride, p.right, row,
        smaller(end, row + kRun), column);
    add_up();
  }
}

inline bool suits_strips(const Product& p, const Block& block) {
  const bool tail = p.tail_depth == 0 || (plain(p.tail_right) && p.tail_right.column_stride == 1 &&
                                          p.tail_depth <= kTailUnits);
  return block.row_end - block.row <= kVeryFewRows && plain(p.right) &&
         p.right.column_stride == 1 && tail &&
         (p.mask == MaskOn::kTail || p.mask == MaskOn::kNothing);
}

template <int kRows, bool kPairs, bool kTailPairs>
void compute_strips(const Product& p, const Block& block, Scratch& scratch) {
  constexpr int64_t kDepth = kUnits * (kPairs ? 2 : 1);
  constexpr int kVectors = kStripVectors<kRows>;
  // What is left of less than a tile is another block.
  const int64_t columns = (block.column_end - block.column) / kTileColumns * kTileColumns;
  const Operand start = {p.start, 0, 1, p.start_dtype, p.start_dtype};
  float* totals = scratch.accumulators;
  for (int64_t c = 0; c < columns; ++c) {
    const float value = p.start != nullptr ? element(start, 0, block.column + c) : 0.0f;
    for (int i = 0; i < kRows; ++i) totals[i * columns + c] = value;
  }
  const uint8_t* bits = nullptr;
  if (p.mask == MaskOn::kTail && columns > 0) {
    for (int i = 0; i < kRows; ++i) {
      draw_row(p.dropout, block.row + i, block.column, columns,
               scratch.tail_bits + i * kBitsStride);
    }
    bits = scratch.tail_bits;
  }
  copy_rows<kTailPairs>(p.tail_left, block.row, kRows, 0, p.tail_depth, scratch.tail_left,
                        kTailStride);
  for (int64_t begin = 0; begin < larger(1, p.depth); begin += kDepth) {
    const int64_t end = smaller(p.depth, begin + kDepth);
    copy_rows<kPairs>(p.left, block.row, kRows, begin, end, scratch.left, kLeftStride);
    int64_t c = 0;
    for (; c + kVectors * kWidth <= columns; c += kVectors * kWidth) {
      compute_strip<kRows, kVectors, kPairs, kTailPairs>(p, block.column + c, begin, end, bits, c,
                                                         scratch, totals + c, columns);
    }
    for (; c < columns; c += kWidth) {
      compute_strip<kRows, 1, kPairs, kTailPairs>(p, block.column + c, begin, end, bits, c, scratch,
                                                  totals + c, columns);
    }
  }
  finish(p, totals, columns / kWidth, block.row, kRows, block.column, columns);
  compute_block<kPairs, kTailPairs>(
      p, {block.row, block.row_end, block.column + columns, block.column_end}, scratch);
}

}  // namespace
}  // namespace fused_lora::cpu::fused
