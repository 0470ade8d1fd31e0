// Many rows: tiles of registers over panels.
#pragma once

#include "cpu/fused/panels.h"

namespace fused_lora::cpu::fused {
namespace {

// A tile of kRows rows and kVectors vectors of columns.
struct Tile {
  const float* left;
  const float* panel;
  int64_t units;
  const float* tail_left;
  const float* tail_panel;
  int64_t tail_units;
  const uint8_t* bits;  // of the mask on the tail, kBitsStride apart; null where none falls now
  int64_t bits_column;
  float tail_scale;
  const float* start;  // what the accumulators begin with; null: with what they hold
  float* accumulators;
};

template <int kRows, int kVectors, bool kPairs>
inline __attribute__((always_inline)) void accumulate(F (&sums)[kRows][kVectors], const float* left,
                                                      int64_t stride, const float* panel,
                                                      int64_t units) {
  for (int64_t unit = 0; unit < units; ++unit) {
    F columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) columns[v] = load(panel + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F row = splat(left[i * stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kPairs) {
          sums[i][v] = multiply_add_pairs(row, columns[v], sums[i][v]);
        } else {
          sums[i][v] = multiply_add(row, columns[v], sums[i][v]);
        }
      }
    }
    panel += kVectors * kWidth;
    ++left;
  }
}

template <int kRows, int kVectors, bool kPairs, bool kTailPairs>
void compute_tile(const Tile& tile) {
  constexpr int kRowFloats = kVectors * kWidth;
  F sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[i][v] = splat(0.0f);
  }
  // What the sums are added to: the start, the same in every row, and then what was added up.
  const float* base = tile.start != nullptr ? tile.start : tile.accumulators;
  int64_t base_stride = tile.start != nullptr ? 0 : kRowFloats;
  const auto add_up = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        store(tile.accumulators + i * kRowFloats + v * kWidth,
              sums[i][v] + load(base + i * base_stride + v * kWidth));
        sums[i][v] = splat(0.0f);
      }
    }
    base = tile.accumulators;
    base_stride = kRowFloats;
  };

  for (int64_t unit = 0; unit < tile.tail_units; unit += kSumUnits) {
    accumulate<kRows, kVectors, kTailPairs>(sums, tile.tail_left + unit, kTailStride,
                                            tile.tail_panel + unit * kRowFloats,
                                            smaller(tile.tail_units - unit, kSumUnits));
    add_up();
  }
  if (tile.bits != nullptr) {
    const F scale = splat(tile.tail_scale);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* tail = tile.accumulators + i * kRowFloats + v * kWidth;
        store(tail,
              keep(load(tail) * scale, tile.bits + i * kBitsStride, tile.bits_column + v * kWidth));
      }
    }
  }
  constexpr int64_t kRun = kPairs ? kUnits : kSumUnits;
  int64_t unit = 0;
  do {
    accumulate<kRows, kVectors, kPairs>(sums, tile.left + unit, kLeftStride,
                                        tile.panel + unit * kRowFloats,
                                        smaller(tile.units - unit, kRun));
    add_up();
    unit += kRun;
  } while (unit < tile.units);
}

using ComputeTile = void (*)(const Tile&);

// The tile of `rows` rows, out of those of 1 .. kRows.
template <int kRows, int kVectors, bool kPairs, bool kTailPairs>
ComputeTile tile_of_rows(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of_rows<kRows - 1, kVectors, kPairs, kTailPairs>(rows);
  }
  return compute_tile<kRows, kVectors, kPairs, kTailPairs>;
}

template <bool kPairs, bool kTailPairs>
ComputeTile tile_of(int64_t rows, int64_t vectors) {
  return vectors == 1 ? tile_of_rows<kTileRows, 1, kPairs, kTailPairs>(rows)
                      : tile_of_rows<kTileRows, kTileVectors, kPairs, kTailPairs>(rows);
}

// Writes what a tile accumulated: rows×columns of the output from (row, column) on.
void finish(const Product& product, const float* sums, int64_t vectors, int64_t row, int64_t rows,
            int64_t column, int64_t columns) {
  const Output& out = product.out;
  const F alpha = splat(product.alpha);
  const bool wide = out.dtype == DType::kFloat32;
  auto* out_f32 = static_cast<float*>(out.data);
  auto* out_bf16 = static_cast<uint16_t*>(out.data);
  const int64_t whole = out.column_stride == 1 ? columns / kWidth * kWidth : 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * out.row_stride + column * out.column_stride;
    const float* from = sums + i * vectors * kWidth;
    for (int64_t c = 0; c < whole; c += kWidth) {
      const F value = load(from + c) * alpha;
      if (wide) {
        store(out_f32 + at + c, value);
      } else {
        store_bf16(out_bf16 + at + c, value);
      }
    }
    for (int64_t c = whole; c < columns; ++c) {
      const float value = from[c] * product.alpha;
      if (wide) {
        out_f32[at + c * out.column_stride] = value;
      } else {
        out_bf16[at + c * out.column_stride] = rounded(value);
      }
    }
  }
}

template <bool kPairs, bool kTailPairs>
void compute_block(const Product& p, const Block& block, Scratch& scratch) {
  constexpr int64_t kDepth = kUnits * (kPairs ? 2 : 1);
  constexpr int64_t kTailDepth = kTailUnits * (kTailPairs ? 2 : 1);
  const int64_t rows = block.row_end - block.row, columns = block.column_end - block.column;
  const int64_t padded = parts(columns, kWidth) * kWidth;
  const int64_t row_panels = parts(rows, kTileRows);
  if (rows <= 0 || columns <= 0) return;

  const Operand start = {p.start, 0, 1, p.start_dtype, p.start_dtype};
  for (int64_t c = 0; c < padded; ++c) {
    scratch.start[c] =
        p.start != nullptr && c < columns ? element(start, 0, block.column + c) : 0.0f;
  }
  const bool mask_tail = p.mask == MaskOn::kTail && p.tail_depth > 0;
  if (mask_tail) {
    for (int64_t i = 0; i < rows; ++i) {
      draw_row(p.dropout, block.row + i, block.column, columns,
               scratch.tail_bits + i * kBitsStride);
    }
  }

  // The tail's chunks come first, the last of them in the same pass as the depth's first.
  const int64_t tail_passes = larger(1, parts(p.tail_depth, kTailDepth));
  const int64_t passes = tail_passes - 1 + larger(1, parts(p.depth, kDepth));
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t tail_begin = smaller(p.tail_depth, pass * kTailDepth);
    const int64_t tail_end = smaller(p.tail_depth, tail_begin + kTailDepth);
    const int64_t chunk = pass - (tail_passes - 1);
    const int64_t begin = chunk < 0 ? 0 : smaller(p.depth, chunk * kDepth);
    const int64_t end = chunk < 0 ? 0 : smaller(p.depth, begin + kDepth);
    const int64_t units = parts(end - begin, kPairs ? 2 : 1);
    const int64_t tail_units = parts(tail_end - tail_begin, kTailPairs ? 2 : 1);

    const uint8_t* right_bits = nullptr;
    if (p.mask == MaskOn::kRight) {
      for (int64_t d = begin; d < end; ++d) {
        draw_row(p.dropout, d, block.column, columns,
                 scratch.right_bits + (d - begin) * kBitsStride);
      }
      right_bits = scratch.right_bits;
    }
    pack_panels<kPairs>(p.right, begin, end, block.column, block.column_end, right_bits,
                        scratch.panels);
    pack_panels<kTailPairs>(p.tail_right, tail_begin, tail_end, block.column, block.column_end,
                            nullptr, scratch.tail_panels);

    for (int64_t panel = 0; panel < row_panels; ++panel) {
      // Tiles of nearly the same height, rather than full ones and a remainder.
      const int64_t row = panel * rows / row_panels, row_end = (panel + 1) * rows / row_panels;
      const int64_t height = row_end - row;
      copy_rows<kPairs>(p.left, block.row + row, height, begin, end, scratch.left, kLeftStride);
      if (p.mask == MaskOn::kLeft) {
        mask_rows<kPairs>(p.dropout, block.row + row, height, begin, end, scratch.left, kLeftStride,
                          scratch.left_bits);
      }
      copy_rows<kTailPairs>(p.tail_left, block.row + row, height, tail_begin, tail_end,
                            scratch.tail_left, kTailStride);
      for (int64_t c = 0; c < columns; c += kTileColumns) {
        const int64_t vectors = smaller(kTileVectors, (padded - c) / kWidth);
        Tile tile;
        tile.left = scratch.left;
        tile.panel = scratch.panels + c * units;
        tile.units = units;
        tile.tail_left = scratch.tail_left;
        tile.tail_panel = scratch.tail_panels + c * tail_units;
        tile.tail_units = tail_units;
        tile.bits =
            mask_tail && pass == tail_passes - 1 ? scratch.tail_bits + row * kBitsStride : nullptr;
        tile.bits_column = c;
        tile.tail_scale = p.tail_scale;
        tile.start = pass == 0 ? scratch.start + c : nullptr;
        tile.accumulators = scratch.accumulators;
        if (passes > 1) tile.accumulators += row * padded + height * c;
        tile_of<kPairs, kTailPairs>(height, vectors)(tile);
        if (pass == passes - 1) {
          finish(p, tile.accumulators, vectors, block.row + row, height, block.column + c,
                 smaller(kTileColumns, columns - c));
        }
      }
    }
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
