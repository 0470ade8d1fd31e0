// Few rows against rows of `right` that lie contiguous, as those of W do for dx = dy W.
//
// Memory is read at its full speed only in long runs, several of them side by side: so a few whole
// rows of `right` at a time meet all columns of a block, the next ones are called into the second
// cache meanwhile, and the sums rest in the caches. An operand that lies otherwise is laid out a
// tile at a time.
#pragma once

#include "cpu/fused/dots.h"

namespace fused_lora::cpu::fused {
namespace {

// Of depth, that the sums meet between two rests.
constexpr int64_t kStreamUnits = 8;
constexpr int64_t kPanelUnits = 64;
constexpr int64_t kPanelAhead = 1024;  // floats
constexpr int64_t kLaidDepth = kPanelRows;
constexpr int kStreamHeight = kTileRows < 8 ? kTileRows : 8;

static_assert(kDotUnits % kStreamUnits == 0 && kDotUnits % kPanelUnits == 0 &&
                  kDotUnits % kLaidDepth == 0,
              "a chunk is of whole pieces");

// How the vectors of a piece of `right` are read.
enum class Source { kF32, kBF16, kUnits };

// Units of the depth, and tiles of kRows rows × kVectors vectors of sums that meet them.
struct Piece {
  const float* left;  // kDotStride apart
  int64_t units, tiles;
  const void* right;
  int64_t pitch;  // elements to the next row of right, or floats to the next unit
  int64_t ahead;  // elements, or floats, to what is read later; 0: has been read
  float* sums;
  int64_t sums_stride;  // from tile to tile
  bool empty;           // the sums begin here
};

template <int kVectors, bool kPairs, Source kSource>
inline __attribute__((always_inline)) void load_unit(const void* right, int64_t at, int64_t pitch,
                                                     int64_t ahead, F (&columns)[kVectors]) {
  if constexpr (kSource == Source::kBF16) {
    const uint16_t* row = as_bf16(right) + at;
    prefetch_far(row + ahead);
    if constexpr (kPairs) prefetch_far(row + pitch + ahead);
    if constexpr (kPairs && kVectors == 2) {
      zip(load(reinterpret_cast<const float*>(row)),
          load(reinterpret_cast<const float*>(row + pitch)), columns);
      return;
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = load_bf16(row + v * kWidth);
      if constexpr (kPairs) {
        columns[v] = interleave(columns[v], load_bf16(row + pitch + v * kWidth));
      }
    }
  } else {
    const float* row = as_f32(right) + at;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      prefetch_far(row + ahead + v * kWidth);
      columns[v] = load(row + v * kWidth);
    }
  }
}

template <int kRows, int kVectors, bool kPairs, Source kSource>
void meet(const Piece& given) {
  const Piece piece = given;  // no store changes it
  const int64_t pitch = kPairs && kSource == Source::kBF16 ? 2 * piece.pitch : piece.pitch;
  float* tile = piece.sums;
  for (int64_t t = 0; t < piece.tiles; ++t) {
    F sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] = splat(0.0f);
    }
    const float* left = piece.left;
    int64_t at = t * kVectors * kWidth;
    for (int64_t unit = 0; unit < piece.units; ++unit) {
      F columns[kVectors];
      load_unit<kVectors, kPairs, kSource>(piece.right, at, piece.pitch, piece.ahead, columns);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const F row = splat(left[i * kDotStride]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          sums[i][v] = multiply_add_units<kPairs>(row, columns[v], sums[i][v]);
        }
      }
      ++left;
      at += pitch;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* to = tile + (i * kVectors + v) * kWidth;
        store(to, piece.empty ? sums[i][v] : load(to) + sums[i][v]);
      }
    }
    tile += piece.sums_stride;
  }
}

using Meet = void (*)(const Piece&);

// That of `rows` rows, out of those of 1 .. kRows.
template <int kRows, bool kPairs, Source kSource>
Meet meet_of(int64_t rows, int64_t vectors) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return meet_of<kRows - 1, kPairs, kSource>(rows, vectors);
  }
  return vectors == 1 ? meet<kRows, 1, kPairs, kSource>
                      : meet<kRows, kTileVectors, kPairs, kSource>;
}

template <bool kPairs>
Meet meet_of(Source source, int64_t rows, int64_t vectors) {
  if (source == Source::kUnits) {
    return meet_of<kStreamHeight, kPairs, Source::kUnits>(rows, vectors);
  }
  if constexpr (!kPairs) {
    if (source == Source::kF32) return meet_of<kStreamHeight, kPairs, Source::kF32>(rows, vectors);
  }
  return meet_of<kStreamHeight, kPairs, Source::kBF16>(rows, vectors);
}

// The sums of a block: tiles from left to right, in each of them row after row.
struct Sums {
  int64_t row, rows, column, columns;
  float* totals;
  float* chunk;  // a long depth is summed in chunks, and the chunks then
  bool empty;    // no totals yet

  int64_t vectors(int64_t c) const { return columns - c >= kTileColumns ? kTileVectors : 1; }
  int64_t width(int64_t c) const { return smaller(vectors(c) * kWidth, columns - c); }
  int64_t floats() const { return parts(columns, kWidth) * kWidth * rows; }
};

// How a right operand is met: rows of it from beginning to end, a packed panel from beginning to
// end, or laid out a tile at a time.
enum class Order { kRows, kPanels, kLaid };

template <bool kPairs>
Order order_of(const Operand& right, const Mask& mask) {
  if (lies_in_panels<kPairs>(right)) return Order::kPanels;
  const bool rows = plain(right) && right.column_stride == 1 && mask.bits == nullptr;
  return rows ? Order::kRows : Order::kLaid;
}

template <bool kPairs>
constexpr int64_t depth_of(Order order) {
  constexpr int64_t kStep = kPairs ? 2 : 1;
  return order == Order::kRows     ? kStep * kStreamUnits
         : order == Order::kPanels ? kStep * kPanelUnits
                                   : kLaidDepth;
}

// All rows of the sums meet a piece.
template <bool kPairs>
void meet_rows(Piece piece, Source source, int64_t rows, int64_t vectors) {
  const int64_t groups = parts(rows, kStreamHeight);
  const float* left = piece.left;
  float* sums = piece.sums;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t i = group * rows / groups, height = (group + 1) * rows / groups - i;
    piece.left = left + i * kDotStride;
    piece.sums = sums + i * vectors * kWidth;
    meet_of<kPairs>(source, height, vectors)(piece);
    piece.ahead = 0;
  }
}

// Adds rows begin .. end-1 of right, times left's columns, to the sums.
template <bool kPairs>
void stream_chunk(const Operand& right, const Mask& mask, const float* left, int64_t begin,
                  int64_t end, const Sums& sums, bool empty, float* to, float* laid) {
  constexpr int64_t kStep = kPairs ? 2 : 1;
  const Order order = order_of<kPairs>(right, mask);
  const int64_t size = right.stored == DType::kBFloat16 ? 2 : 4;
  const auto meet_columns = [&](int64_t row, int64_t row_end, int64_t c, int64_t tiles) {
    const int64_t column = sums.column + c, width = tiles * sums.width(c);
    Piece piece;
    Source source = Source::kUnits;
    piece.left = left + (row - begin) / kStep;
    piece.units = parts(row_end - row, kStep);
    piece.tiles = tiles;
    piece.right = static_cast<const char*>(right.data) + size * place_of(right, row, column);
    piece.pitch = kPanelRows;
    piece.ahead = 0;
    piece.sums = to + c * sums.rows;
    piece.sums_stride = kTileColumns * sums.rows;
    piece.empty = empty && row == begin;
    // Lanes past the last column hold the next row's elements, and nobody reads their sums.
    const int64_t past = parts(width, kWidth) * kWidth - width;
    const bool within = past == 0 || (end - row_end) * right.row_stride >= past;
    if (order == Order::kRows && within && (row_end - row) % kStep == 0) {
      source = size == 2 ? Source::kBF16 : Source::kF32;
      piece.pitch = right.row_stride;
      piece.ahead = (row_end - row) * right.row_stride;
    } else if (order == Order::kPanels) {
      piece.ahead = kPanelAhead;
    } else {
      pack_panels<kPairs>(right, row, row_end, column, column + width, mask, laid);
      piece.right = laid;
      piece.pitch = kTileColumns;
    }
    meet_rows<kPairs>(piece, source, sums.rows, sums.vectors(c));
  };
  // Few columns, as those of g, rest in registers meanwhile.
  const bool narrow = order == Order::kRows && sums.columns <= kTileColumns;
  const int64_t depth = narrow ? kStep * kPanelUnits : depth_of<kPairs>(order);
  const int64_t full = sums.columns / kTileColumns;
  if (order == Order::kPanels) {
    for (int64_t c = 0; c < sums.columns; c += sums.width(c)) {
      for (int64_t row = begin; row < end; row += depth) {
        meet_columns(row, smaller(end, row + depth), c, 1);
      }
    }
    return;
  }
  for (int64_t row = begin; row < end; row += depth) {
    const int64_t row_end = smaller(end, row + depth);
    // A piece whose rows are not whole units is laid out, a tile of it at a time.
    const bool together = order == Order::kRows && (row_end - row) % kStep == 0 && full > 0;
    if (together) meet_columns(row, row_end, 0, full);
    for (int64_t c = together ? full * kTileColumns : 0; c < sums.columns; c += sums.width(c)) {
      meet_columns(row, row_end, c, 1);
    }
  }
}

template <bool kPairs>
void stream(const Operand& left, const Operand& right, int64_t depth, const Mask& left_mask,
            const Mask& mask, Sums& sums, Scratch& scratch) {
  constexpr int64_t kDepth = (kPairs ? 2 : 1) * kDotUnits;
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t end = smaller(depth, begin + kDepth);
    copy_rows<kPairs>(left, sums.row, sums.rows, begin, end, scratch.dot_left, kDotStride);
    if (left_mask.bits != nullptr) {
      mask_rows<kPairs>(left_mask, sums.row, sums.rows, begin, end, scratch.dot_left, kDotStride);
    }
    const bool first = begin == 0;
    stream_chunk<kPairs>(right, mask, scratch.dot_left, begin, end, sums, first ? sums.empty : true,
                         first ? sums.totals : sums.chunk, scratch.panels);
    sums.empty = false;
    if (first) continue;
    for (int64_t i = 0; i < sums.floats(); i += kWidth) {
      store(sums.totals + i, load(sums.totals + i) + load(sums.chunk + i));
    }
  }
}

inline bool suits_streams(const Product& p) {
  return p.rows <= kFewRows;
}

template <bool kPairs, bool kTailPairs>
void compute_streams(const Product& p, const Block& block, Scratch& scratch) {
  Sums sums;
  sums.row = block.row;
  sums.rows = block.row_end - block.row;
  sums.column = block.column;
  sums.columns = block.column_end - block.column;
  sums.totals = scratch.accumulators;
  sums.chunk = scratch.accumulators + kFewRows * kFewColumns;
  sums.empty = p.start == nullptr && p.depth + p.tail_depth > 0;
  const auto each_tile = [&](const auto& visit) {
    for (int64_t c = 0; c < sums.columns; c += sums.width(c)) {
      visit(c, sums.totals + c * sums.rows, sums.vectors(c));
    }
  };
  if (!sums.empty) {
    const Operand start = {p.start, 0, 1, p.start_dtype};
    each_tile([&](int64_t c, float* tile, int64_t vectors) {
      if (p.start_row_stride != 0) {
        for (int64_t i = 0; i < sums.rows; ++i) {
          const float* from = start_of(p, sums.row + i, sums.column + c);
          for (int64_t v = 0; v < vectors; ++v) {
            store(tile + (i * vectors + v) * kWidth, load(from + v * kWidth));
          }
        }
        return;
      }
      for (int64_t j = 0; j < vectors * kWidth; ++j) {
        const bool used = p.start != nullptr && c + j < sums.columns;
        tile[j] = used ? element(start, 0, sums.column + c + j) : 0.0f;
        for (int64_t i = 1; i < sums.rows; ++i) tile[i * vectors * kWidth + j] = tile[j];
      }
    });
  }
  const Mask none;
  stream<kTailPairs>(p.tail_left, p.tail_right, p.tail_depth, none, none, sums, scratch);
  if (p.mask == MaskOn::kTail) {
    const F scale = splat(p.tail_scale);
    each_tile([&](int64_t c, float* tile, int64_t vectors) {
      for (int64_t i = 0; i < sums.rows; ++i) {
        for (int64_t v = 0; v < vectors; ++v) {
          float* at = tile + (i * vectors + v) * kWidth;
          store(at, keep(load(at) * scale, p.drawn, sums.row + i, sums.column + c + v * kWidth));
        }
      }
    });
  }
  stream<kPairs>(p.left, p.right, p.depth, p.mask == MaskOn::kLeft ? p.drawn : none,
                 p.mask == MaskOn::kRight ? p.drawn : none, sums, scratch);
  each_tile([&](int64_t c, float* tile, int64_t vectors) {
    finish(p, tile, vectors, sums.row, sums.rows, sums.column + c, sums.width(c));
  });
}

}  // namespace
}  // namespace fused_lora::cpu::fused
