// Operands as the kernels read them: rows copied as units, edges and odd strides element by
// element.
#pragma once

#include "cpu/fused/scratch.h"

namespace fused_lora::cpu::fused {
namespace {

inline uint16_t rounded(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Operands, element by element: edges and odd strides.

inline const float* as_f32(const void* data) {
  return static_cast<const float*>(data);
}
inline const uint16_t* as_bf16(const void* data) {
  return static_cast<const uint16_t*>(data);
}

// Where an element lies, from the operand's first on.
inline int64_t place_of(const Operand& operand, int64_t row, int64_t column) {
  if (operand.layout == Layout::kStrided) {
    return row * operand.row_stride + column * operand.column_stride;
  }
  const bool transposed = operand.layout == Layout::kPanelsTransposed;
  const int64_t across = transposed ? row : column, down = transposed ? column : row;
  const int64_t panel = across / kPanelRows, lane = across % kPanelRows;
  const int64_t stride = transposed ? operand.row_stride : operand.column_stride;
  return panel * stride + (operand.stored == DType::kFloat32
                               ? kPanelRows * down + lane
                               : 2 * kPanelRows * (down / 2) + 2 * lane + down % 2);
}

inline float element(const Operand& operand, int64_t row, int64_t column) {
  const int64_t at = place_of(operand, row, column);
  if (operand.stored == DType::kBFloat16) return widened(as_bf16(operand.data)[at]);
  return as_f32(operand.data)[at];
}

// What row `row` of a product starts from, from `column` on, where every row has its own.
inline const float* start_of(const Product& product, int64_t row, int64_t column) {
  return as_f32(product.start) + row * product.start_row_stride + column;
}

inline bool kept(const Mask& mask, int64_t row, int64_t column) {
  if (mask.bits == nullptr) return true;
  return (mask.bits[row * mask.row_stride + (column >> 3)] >> (column & 7)) & 1;
}

inline F keep(F value, const Mask& mask, int64_t row, int64_t column) {
  return mask.bits == nullptr ? value : keep(value, mask.bits + row * mask.row_stride, column);
}

inline float pair(float first, float second) {
  const uint16_t halves[2] = {rounded(first), rounded(second)};
  float both;
  __builtin_memcpy(&both, halves, sizeof(both));
  return both;
}

// Whether vectors may read the operand by its strides.
inline bool plain(const Operand& operand) {
  return operand.layout == Layout::kStrided;
}

inline Operand transposed(Operand operand) {
  const int64_t stride = operand.row_stride;
  operand.row_stride = operand.column_stride;
  operand.column_stride = stride;
  return operand;
}

template <bool kPairs>
inline F multiply_add_units(F a, F b, F c) {
  if constexpr (kPairs) return multiply_add_pairs(a, b, c);
  return multiply_add(a, b, c);
}

// A vector of units from element `at` on.
template <bool kPairs>
inline F load_units(const Operand& operand, int64_t at) {
  if (kPairs) return load(reinterpret_cast<const float*>(as_bf16(operand.data) + at));
  return operand.stored == DType::kBFloat16 ? load_bf16(as_bf16(operand.data) + at)
                                            : load(as_f32(operand.data) + at);
}

// The first `count` units of a vector, and zeros; reads no further.
template <bool kPairs>
inline F load_first(const Operand& operand, int64_t at, int64_t count) {
  return load_first(kPairs ? reinterpret_cast<const float*>(as_bf16(operand.data) + at)
                           : as_f32(operand.data) + at,
                    count);
}

// Rows are far apart, and each is read for a short way only: the processor does not foresee the
// next by itself.
constexpr int64_t kRowsAhead = 8;

inline void prefetch(const Operand& operand, int64_t at) {
  const int64_t size = operand.stored == DType::kBFloat16 ? 2 : 4;
  __builtin_prefetch(static_cast<const char*>(operand.data) + at * size);
}

// Into the second cache: what comes later than the next lines. More of these are under way at once
// than the first cache waits for.
inline void prefetch_far(const void* at) {
  __builtin_prefetch(at, 0, 2);
}

inline void prefetch_far(const Operand& operand, int64_t at) {
  const int64_t size = operand.stored == DType::kBFloat16 ? 2 : 4;
  prefetch_far(static_cast<const char*>(operand.data) + at * size);
}

// Rows row .. row+rows-1 of `from`, columns begin .. end-1, as units: to[i * stride + unit].
template <bool kPairs>
void copy_rows(const Operand& from, int64_t row, int64_t rows, int64_t begin, int64_t end,
               float* to, int64_t stride) {
  constexpr int kStep = kPairs ? 2 : 1;
  const bool contiguous = plain(from) && from.column_stride == 1;
  const int64_t whole = contiguous ? (end - begin) / (kStep * kWidth) * kWidth : 0;
  for (int64_t i = 0; i < rows; ++i) {
    float* out = to + i * stride;
    const int64_t at = (row + i) * from.row_stride + begin * from.column_stride;
    for (int64_t unit = 0; unit < whole; unit += kWidth) {
      prefetch(from, at + kStep * unit + 3 * from.row_stride);
      store(out + unit, load_units<kPairs>(from, at + kStep * unit));
    }
    int64_t unit = whole;
    const int64_t rest = (end - begin) / kStep - whole;
    if (contiguous && rest > 0 && (kPairs || from.stored == DType::kFloat32)) {
      store(out + unit, load_first<kPairs>(from, at + kStep * unit, rest));
      unit += rest;
    }
    for (; begin + kStep * unit < end; ++unit) {
      const int64_t column = begin + kStep * unit;
      const float first = element(from, row + i, column);
      out[unit] = !kPairs
                      ? first
                      : pair(first, column + 1 < end ? element(from, row + i, column + 1) : 0.0f);
    }
  }
}

// Zeros from a row's units to the next whole vector.
inline void pad_rows(float* units, int64_t rows, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t unit = count; unit % kWidth != 0; ++unit) units[i * stride + unit] = 0.0f;
  }
}

// Zeros what the mask drops of rows row .. row+rows-1, columns begin .. end-1, as units.
template <bool kPairs>
void mask_rows(const Mask& mask, int64_t row, int64_t rows, int64_t begin, int64_t end,
               float* units, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* bits = mask.bits + (row + i) * mask.row_stride;
    float* out = units + i * stride;
    for (int64_t c = begin; c < end; c += kPairs ? 2 * kWidth : kWidth) {
      if constexpr (kPairs) {
        store(out, keep_halves(load(out), bits, c));
      } else {
        store(out, keep(load(out), bits, c));
      }
      out += kWidth;
    }
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
