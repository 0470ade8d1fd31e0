// Many rows: tiles of registers over panels.
#pragma once

#include "cpu/fused/panels.h"

namespace fused_lora::cpu::fused {
namespace {

alignas(64) constexpr float kZeros[kTileColumns] = {};

// A tile of kRows rows and kVectors vectors of columns.
struct Tile {
  const float* left;
  const float* panel;
  int64_t panel_stride;
  int64_t units;
  const float* tail_left;
  const float* tail_panel;
  int64_t tail_units;
  Mask mask;  // on the tail; no bits where none falls now
  int64_t row, column;
  float tail_scale;
  const float* base;    // what the sums are added to: height × kVectors · kWidth, or one row of it
  int64_t base_stride;  // 0: the same in every row
  float* between;       // where they rest between runs
  float* out;           // and in the end
  const char* written;  // what is written next, a row each `written_stride` bytes
  int64_t written_stride, written_bytes;
};

template <int kRows, int kVectors, bool kPairs>
inline __attribute__((always_inline)) void accumulate(F (&sums)[kRows][kVectors], const float* left,
                                                      int64_t stride, const float* panel,
                                                      int64_t panel_stride, int64_t units) {
  for (int64_t unit = 0; unit < units; ++unit) {
    F columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) columns[v] = load(panel + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F row = splat(left[i * stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = multiply_add_units<kPairs>(row, columns[v], sums[i][v]);
      }
    }
    panel += panel_stride;
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
  if (tile.base_stride != 0) {
    for (int i = 0; i < kRows * kVectors; ++i) __builtin_prefetch(tile.base + i * kWidth);
  }
  // What runs are added to: nothing, and then what was added up. What the tile began with comes
  // last, so that a long sum is one of passes, of runs, of products, and each of few.
  const float* rest = kZeros;
  int64_t rest_stride = 0;
  const auto add_up = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        store(tile.between + i * kRowFloats + v * kWidth,
              sums[i][v] + load(rest + i * rest_stride + v * kWidth));
        sums[i][v] = splat(0.0f);
      }
    }
    rest = tile.between;
    rest_stride = kRowFloats;
  };

  for (int64_t unit = 0; unit < tile.tail_units; unit += kSumUnits) {
    accumulate<kRows, kVectors, kTailPairs>(sums, tile.tail_left + unit, kTailStride,
                                            tile.tail_panel + unit * kTileColumns, kTileColumns,
                                            smaller(tile.tail_units - unit, kSumUnits));
    add_up();
  }
  if (tile.mask.bits != nullptr) {
    const F scale = splat(tile.tail_scale);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* tail = tile.between + i * kRowFloats + v * kWidth;
        store(tail, keep(load(tail) * scale, tile.mask, tile.row + i, tile.column + v * kWidth));
      }
    }
  }
  int64_t unit = 0;
  for (; unit + kSumUnits < tile.units; unit += kSumUnits) {
    accumulate<kRows, kVectors, kPairs>(sums, tile.left + unit, kLeftStride,
                                        tile.panel + unit * tile.panel_stride, tile.panel_stride,
                                        kSumUnits);
    if (!kPairs) add_up();
  }
  // Early enough to arrive, and late enough to stay.
  for (int i = 0; i < kRows; ++i) {
    const char* line = tile.written + i * tile.written_stride;
    __builtin_prefetch(line, 1);
    __builtin_prefetch(line + tile.written_bytes - 1, 1);
  }
  accumulate<kRows, kVectors, kPairs>(sums, tile.left + unit, kLeftStride,
                                      tile.panel + unit * tile.panel_stride, tile.panel_stride,
                                      tile.units - unit);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      store(tile.out + i * kRowFloats + v * kWidth,
            (sums[i][v] + load(rest + i * rest_stride + v * kWidth)) +
                load(tile.base + i * tile.base_stride + v * kWidth));
    }
  }
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

// finish for an output whose columns lie contiguous, as those of dB do, which is made transposed.
void finish_down(const Product& product, const float* sums, int64_t vectors, int64_t row,
                 int64_t rows, int64_t column, int64_t columns) {
  const Output& out = product.out;
  const F alpha = splat(product.alpha);
  for (int64_t i = 0; i < rows; i += kWidth) {
    const int64_t height = smaller(kWidth, rows - i);
    for (int64_t c = 0; c < columns; c += kWidth) {
      F square[kWidth];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const float* from = sums + (i + lane) * vectors * kWidth + c;
        square[lane] = lane < height ? load(from) * alpha : splat(0.0f);
      }
      transpose(square);
      float values[kWidth * kWidth];
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane) store(values + lane * kWidth, square[lane]);
      for (int64_t j = 0; j < smaller(kWidth, columns - c); ++j) {
        const int64_t at = row + i + (column + c + j) * out.column_stride;
        const float* from = values + j * kWidth;
        if (out.dtype == DType::kFloat32) {
          float* to = static_cast<float*>(out.data) + at;
          if (height == kWidth) store(to, load(from));
          for (int64_t k = 0; k < height && height < kWidth; ++k) to[k] = from[k];
        } else {
          uint16_t* to = static_cast<uint16_t*>(out.data) + at;
          if (height == kWidth) store_bf16(to, load(from));
          for (int64_t k = 0; k < height && height < kWidth; ++k) to[k] = rounded(from[k]);
        }
      }
    }
  }
}

// Writes what a tile accumulated: rows×columns of the output from (row, column) on.
void finish(const Product& product, const float* sums, int64_t vectors, int64_t row, int64_t rows,
            int64_t column, int64_t columns) {
  const Output& out = product.out;
  if (out.row_stride == 1 && out.column_stride != 1) {
    return finish_down(product, sums, vectors, row, rows, column, columns);
  }
  const F alpha = splat(product.alpha);
  const bool wide = out.dtype == DType::kFloat32;
  auto* out_f32 = static_cast<float*>(out.data);
  auto* out_bf16 = static_cast<uint16_t*>(out.data);
  const float* base_f32 = as_f32(product.base);
  const uint16_t* base_bf16 = as_bf16(product.base);
  const int64_t whole = out.column_stride == 1 ? columns / kWidth * kWidth : 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * out.row_stride + column * out.column_stride;
    const int64_t base_at = (row + i) * product.base_row_stride + column;
    const float* from = sums + i * vectors * kWidth;
    for (int64_t c = 0; c < whole; c += kWidth) {
      F value = load(from + c) * alpha;
      if (product.base != nullptr) {
        value = value + (wide ? load(base_f32 + base_at + c) : load_bf16(base_bf16 + base_at + c));
      }
      if (wide) {
        store(out_f32 + at + c, value);
      } else {
        store_bf16(out_bf16 + at + c, value);
      }
    }
    for (int64_t c = whole; c < columns; ++c) {
      const int64_t place = at + c * out.column_stride;
      float value = from[c] * product.alpha;
      if (product.base != nullptr) {
        value += wide ? base_f32[base_at + c] : widened(base_bf16[base_at + c]);
      }
      if (wide) {
        out_f32[place] = value;
      } else {
        out_bf16[place] = rounded(value);
      }
    }
  }
}

// Whether tiles read the right operand where it lies: a packed weight, in the units they take.
template <bool kPairs>
inline bool lies_in_panels(const Operand& right) {
  return right.layout == Layout::kPanels &&
         right.stored == (kPairs ? DType::kBFloat16 : DType::kFloat32);
}

template <bool kPairs, bool kTailPairs>
void compute_block(const Product& p, const Block& block, Scratch& scratch) {
  constexpr int64_t kStep = kPairs ? 2 : 1;
  constexpr int64_t kTailDepth = kTailUnits * (kTailPairs ? 2 : 1);
  const int64_t rows = block.row_end - block.row, columns = block.column_end - block.column;
  const int64_t padded = parts(columns, kWidth) * kWidth;
  const int64_t row_panels = parts(rows, kTileRows);
  if (rows <= 0 || columns <= 0) return;

  const Operand start = {p.start, 0, 1, p.start_dtype};
  const bool start_of_rows = p.start_row_stride != 0;
  for (int64_t c = 0; c < padded; ++c) {
    const bool used = p.start != nullptr && !start_of_rows && c < columns;
    scratch.start[c] = used ? element(start, 0, block.column + c) : 0.0f;
  }
  const Mask none;
  const bool direct = lies_in_panels<kPairs>(p.right);

  // The tail's chunks come first, the last of them in the same pass as the depth's first.
  const int64_t tail_passes = larger(1, parts(p.tail_depth, kTailDepth));
  const int64_t chunks = larger(1, parts(p.depth, kStep * kUnits));
  const int64_t chunk_depth = parts(parts(p.depth, chunks), kChunkStep) * kChunkStep;
  const int64_t passes = tail_passes - 1 + chunks;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t tail_begin = smaller(p.tail_depth, pass * kTailDepth);
    const int64_t tail_end = smaller(p.tail_depth, tail_begin + kTailDepth);
    const int64_t chunk = pass - (tail_passes - 1);
    const int64_t begin = chunk < 0 ? 0 : smaller(p.depth, chunk * chunk_depth);
    const int64_t end = chunk < 0 ? 0 : smaller(p.depth, begin + chunk_depth);
    const int64_t units = parts(end - begin, kStep);
    const int64_t tail_units = parts(tail_end - tail_begin, kTailPairs ? 2 : 1);

    if (!direct) {
      pack_panels<kPairs>(p.right, begin, end, block.column, block.column_end,
                          p.mask == MaskOn::kRight ? p.drawn : none, scratch.panels);
    }
    pack_panels<kTailPairs>(p.tail_right, tail_begin, tail_end, block.column, block.column_end,
                            none, scratch.tail_panels);

    for (int64_t panel = 0; panel < row_panels; ++panel) {
      // Tiles of nearly the same height, rather than full ones and a remainder.
      const int64_t row = panel * rows / row_panels, row_end = (panel + 1) * rows / row_panels;
      const int64_t height = row_end - row;
      copy_rows<kPairs>(p.left, block.row + row, height, begin, end, scratch.left, kLeftStride);
      if (p.mask == MaskOn::kLeft) {
        mask_rows<kPairs>(p.drawn, block.row + row, height, begin, end, scratch.left, kLeftStride);
      }
      copy_rows<kTailPairs>(p.tail_left, block.row + row, height, tail_begin, tail_end,
                            scratch.tail_left, kTailStride);
      for (int64_t c = 0; c < columns; c += kTileColumns) {
        const int64_t vectors = smaller(kTileVectors, (padded - c) / kWidth);
        Tile tile;
        tile.left = scratch.left;
        if (direct) {
          tile.panel = static_cast<const float*>(p.right.data) +
                       place_of(p.right, begin, block.column + c) / kStep;
          tile.panel_stride = kPanelRows;
        } else {
          tile.panel = scratch.panels + c / kTileColumns * panel_floats(units);
          tile.panel_stride = kTileColumns;
        }
        tile.units = units;
        tile.tail_left = scratch.tail_left;
        tile.tail_panel = scratch.tail_panels + c / kTileColumns * panel_floats(tail_units);
        tile.tail_units = tail_units;
        tile.mask = p.mask == MaskOn::kTail && tail_units > 0 ? p.drawn : none;
        tile.row = block.row + row;
        tile.column = block.column + c;
        tile.tail_scale = p.tail_scale;
        float* kept = scratch.accumulators + row * padded + height * c;
        tile.base = kept;
        tile.base_stride = vectors * kWidth;
        if (pass == 0 && start_of_rows) {
          tile.base = start_of(p, block.row + row, block.column + c);
          tile.base_stride = p.start_row_stride;
        } else if (pass == 0) {
          tile.base = scratch.start + c;
          tile.base_stride = 0;
        }
        tile.between = scratch.tile;
        if (pass == passes - 1) {
          const int64_t size = p.out.dtype == DType::kFloat32 ? 4 : 2;
          tile.out = scratch.tile;
          tile.written = static_cast<const char*>(p.out.data) +
                         size * ((block.row + row) * p.out.row_stride +
                                 (block.column + c) * p.out.column_stride);
          tile.written_stride = size * p.out.row_stride;
          tile.written_bytes = size * vectors * kWidth;
        } else {
          tile.out = kept;
          tile.written = reinterpret_cast<const char*>(kept);
          tile.written_stride = tile.written_bytes = 4 * vectors * kWidth;
        }
        tile_of<kPairs, kTailPairs>(height, vectors)(tile);
        if (pass == passes - 1) {
          finish(p, scratch.tile, vectors, block.row + row, height, block.column + c,
                 smaller(kTileColumns, columns - c));
        }
      }
    }
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
