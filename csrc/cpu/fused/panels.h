// Chunks of the right operand, laid out for the tiles.
#pragma once

#include "cpu/fused/operands.h"

namespace fused_lora::cpu::fused {
namespace {

// How vectors may read an operand: neighbours in a row, in a column, or not at all.
enum class Reading { kAcross, kDown, kElements };

inline Reading reading_of(const Operand& from) {
  switch (from.layout) {
    case Layout::kPanels:
      return Reading::kAcross;
    case Layout::kPanelsTransposed:
      return Reading::kDown;
    case Layout::kStrided:
      break;
  }
  if (from.column_stride == 1) return Reading::kAcross;
  return from.row_stride == 1 ? Reading::kDown : Reading::kElements;
}

// Elements (row, column) .. of a row that is read across.
inline F load_across(const Operand& from, int64_t row, int64_t column) {
  const int64_t at = place_of(from, row, column);
  if (from.layout == Layout::kStrided || from.stored == DType::kFloat32) {
    return load_units<false>(from, at);
  }
  const F pairs = load_units<true>(from, at - row % 2);
  return row % 2 == 0 ? low_halves(pairs) : high_halves(pairs);
}

// The units that begin at `row` of columns column .. column+kWidth-1, a vector for each column. Of
// a weight's panels row and column are multiples of kWidth. ahead: from there to what is read
// later.
template <bool kPairs>
inline __attribute__((always_inline)) void load_down(const Operand& from, int64_t row,
                                                     int64_t column, int64_t ahead,
                                                     F (&columns)[kWidth]) {
  if (from.layout == Layout::kStrided) {
    const int64_t at = row + column * from.column_stride;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      prefetch_far(from, at + i * from.column_stride + ahead);
      columns[i] = load_units<kPairs>(from, at + i * from.column_stride);
    }
    return;
  }
  const int64_t at = place_of(from, row, column);
  if (from.stored == DType::kFloat32) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      const int64_t here = at + i * kPanelRows;
      prefetch_far(as_f32(from.data) + here + ahead);
      columns[i] = load(as_f32(from.data) + here);
    }
    return;
  }
  // Pairs of neighbouring columns; the pairs wanted, if any, are those of neighbouring rows.
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; i += 2) {
    const int64_t here = at + i * kPanelRows;
    const F first = load_units<true>(from, here);
    prefetch_far(as_bf16(from.data) + here + ahead);
    if constexpr (kPairs) {
      prefetch_far(as_bf16(from.data) + here + ahead + 2 * kWidth);
      const F second = load_units<true>(from, here + 2 * kWidth);
      columns[i] = halves<0>(first, second);
      columns[i + 1] = halves<1>(first, second);
    } else {
      columns[i] = low_halves(first);
      columns[i + 1] = high_halves(first);
    }
  }
}

constexpr int64_t kUnitsAhead = 8 * kWidth;

// From a panel of so many units to the next: a unit more, since panels a multiple of a page apart
// would push each other out of the first cache as a row is written across them.
inline int64_t panel_floats(int64_t units) {
  return (units + 1) * kTileColumns;
}

// Columns column .. column_end-1 of `from`, rows begin .. end-1, in panels; those that the mask
// drops are zeros.
template <bool kPairs>
void pack_panels(const Operand& from, int64_t begin, int64_t end, int64_t column,
                 int64_t column_end, const Mask& mask, float* panels) {
  constexpr int kStep = kPairs ? 2 : 1;
  const int64_t columns = column_end - column, units = parts(end - begin, kStep);
  Reading reading = reading_of(from);
  if (reading == Reading::kDown && mask.bits != nullptr) reading = Reading::kElements;

  const auto place = [&](int64_t c, int64_t unit) {
    return panels + c / kTileColumns * panel_floats(units) + unit * kTileColumns + c % kTileColumns;
  };
  const auto element_wise = [&](int64_t c, int64_t first_unit) {
    for (int64_t unit = first_unit; unit < units; ++unit) {
      const int64_t row = begin + kStep * unit;
      float* out = place(c, unit);
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const auto read = [&](int64_t r) {
          const bool used = r < end && c + lane < columns && kept(mask, r, column + c + lane);
          return used ? element(from, r, column + c + lane) : 0.0f;
        };
        out[lane] = kPairs ? pair(read(row), read(row + 1)) : read(row);
      }
    }
  };

  const int64_t whole = reading == Reading::kElements ? 0 : columns / kWidth * kWidth;
  const auto across = [&](const auto& read) {
    const auto vector = [&](int64_t row, int64_t c) {
      if constexpr (kPairs) {
        return interleave(read(row, c), row + 1 < end ? read(row + 1, c) : splat(0.0f));
      }
      return read(row, c);
    };
    const int64_t full = columns / kTileColumns * kTileColumns;
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t row = begin + kStep * unit;
      float* out = panels + unit * kTileColumns;
      for (int64_t c = 0; c < full; c += kTileColumns) {
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) store(out + v * kWidth, vector(row, c + v * kWidth));
        out += panel_floats(units);
      }
      if (full < whole) store(out, vector(row, full));
    }
  };
  if (reading == Reading::kAcross && plain(from) && mask.bits == nullptr) {
    across([&](int64_t row, int64_t c) {
      const int64_t at = row * from.row_stride + column + c;
      prefetch(from, at + kRowsAhead * from.row_stride);
      return load_units<false>(from, at);
    });
  } else if (reading == Reading::kAcross) {
    across([&](int64_t row, int64_t c) {
      return keep(load_across(from, row, column + c), mask, row, column + c);
    });
  } else if (reading == Reading::kDown) {
    const int64_t whole_units = (end - begin) / (kStep * kWidth) * kWidth;
    // What is read so much later: down the same columns, then down the next ones; or along a panel.
    const int64_t next_columns = plain(from)                ? kWidth * from.column_stride
                                 : end - begin > kPanelRows ? from.row_stride
                                                            : 2 * kPanelRows * kTileColumns;
    const auto ahead_of = [&](int64_t unit) {
      if (!plain(from)) return next_columns;
      const int64_t later = unit + kUnitsAhead;
      const int64_t past = later < whole_units ? 0 : next_columns - kStep * whole_units;
      return kStep * kUnitsAhead + past;
    };
    // Less than a vector of units, such as those of a low rank.
    const bool first_units = plain(from) && (kPairs || from.stored == DType::kFloat32);
    const int64_t rest = first_units ? (end - begin) / kStep - whole_units : 0;
    for (int64_t c = 0; c < whole; c += kWidth) {
      for (int64_t unit = 0; unit < whole_units; unit += kWidth) {
        F block[kWidth];
        load_down<kPairs>(from, begin + kStep * unit, column + c, ahead_of(unit), block);
        transpose(block);
        float* out = place(c, unit);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store(out + i * kTileColumns, block[i]);
      }
      if (rest > 0) {
        F block[kWidth];
        const int64_t at = begin + kStep * whole_units + (column + c) * from.column_stride;
        for (int i = 0; i < kWidth; ++i) {
          block[i] = load_first<kPairs>(from, at + i * from.column_stride, rest);
        }
        transpose(block);
        float* out = place(c, whole_units);
        for (int64_t i = 0; i < rest; ++i) store(out + i * kTileColumns, block[i]);
      }
      element_wise(c, whole_units + rest);
    }
  }
  for (int64_t c = whole; c < columns; c += kWidth) element_wise(c, 0);
}

}  // namespace
}  // namespace fused_lora::cpu::fused
