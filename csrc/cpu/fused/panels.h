// Chunks of the right operand, laid out for the tiles.
#pragma once

#include "cpu/fused/operands.h"

namespace fused_lora::cpu::fused {
namespace {

// Columns column .. column_end-1 of `from`, rows begin .. end-1, in panels. bits: the mask's rows,
// kBitsStride apart, or null.
template <bool kPairs>
void pack_panels(const Operand& from, int64_t begin, int64_t end, int64_t column,
                 int64_t column_end, const uint8_t* bits, float* panels) {
  constexpr int kStep = kPairs ? 2 : 1;
  const int64_t columns = column_end - column, units = parts(end - begin, kStep);
  const bool across = plain(from) && from.column_stride == 1;
  const bool down = plain(from) && !across && from.row_stride == 1 && bits == nullptr;

  // Vectors of columns: kTileVectors of them in a panel, but in the last there may be fewer.
  const auto place = [&](int64_t c) {
    const int64_t panel = c / kTileColumns * kTileColumns;
    const int64_t width = smaller(kTileColumns, parts(columns - panel, kWidth) * kWidth);
    struct {
      float* first;
      int64_t width;
    } at = {panels + panel * units + (c - panel), width};
    return at;
  };
  const auto element_wise = [&](int64_t c, int64_t first_unit) {
    const auto at = place(c);
    for (int64_t unit = first_unit; unit < units; ++unit) {
      const int64_t row = begin + kStep * unit;
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const auto read = [&](int64_t r) {
          const bool used = r < end && c + lane < columns &&
                            (bits == nullptr || kept(bits + (r - begin) * kBitsStride, c + lane));
          return used ? element(from, r, column + c + lane) : 0.0f;
        };
        at.first[unit * at.width + lane] = kPairs ? pair(read(row), read(row + 1)) : read(row);
      }
    }
  };

  const int64_t whole = across || down ? columns / kWidth * kWidth : 0;
  if (across) {
    const auto read = [&](int64_t row, int64_t c) {
      if (row >= end) return splat(0.0f);
      const int64_t at = row * from.row_stride + column + c;
      prefetch(from, at + kRowsAhead * from.row_stride);
      const F value = load_units<false>(from, at);
      return bits == nullptr ? value : keep(value, bits + (row - begin) * kBitsStride, c);
    };
    const auto vector = [&](int64_t row, int64_t c) {
      if constexpr (kPairs) return interleave(read(row, c), read(row + 1, c));
      return read(row, c);
    };
    const int64_t full = columns / kTileColumns * kTileColumns;
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t row = begin + kStep * unit;
      float* out = panels + unit * kTileColumns;
      for (int64_t c = 0; c < full; c += kTileColumns) {
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) store(out + v * kWidth, vector(row, c + v * kWidth));
        out += kTileColumns * units;
      }
      for (int64_t c = full; c < whole; c += kWidth) {
        const auto at = place(c);
        store(at.first + unit * at.width, vector(row, c));
      }
    }
  } else if (down) {
    const int64_t whole_units = (end - begin) / (kStep * kWidth) * kWidth;
    for (int64_t c = 0; c < whole; c += kWidth) {
      const auto at = place(c);
      for (int64_t unit = 0; unit < whole_units; unit += kWidth) {
        F rows[kWidth];
        const int64_t corner = (column + c) * from.column_stride + begin + kStep * unit;
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          rows[i] = load_units<kPairs>(from, corner + i * from.column_stride);
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store(at.first + (unit + i) * at.width, rows[i]);
      }
      element_wise(c, whole_units);
    }
  }
  for (int64_t c = whole; c < columns; c += kWidth) element_wise(c, 0);
}

}  // namespace
}  // namespace fused_lora::cpu::fused
