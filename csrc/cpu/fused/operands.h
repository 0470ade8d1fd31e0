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

inline float element(const Operand& operand, int64_t row, int64_t column) {
  const int64_t at = row * operand.row_stride + column * operand.column_stride;
  if (operand.stored == DType::kBFloat16) return widened(as_bf16(operand.data)[at]);
  const float value = as_f32(operand.data)[at];
  return operand.used == DType::kBFloat16 ? widened(rounded(value)) : value;
}

inline bool kept(const uint8_t* bits, int64_t column) {
  return (bits[column >> 3] >> (column & 7)) & 1;
}

inline float pair(float first, float second) {
  const uint16_t halves[2] = {rounded(first), rounded(second)};
  float both;
  __builtin_memcpy(&both, halves, sizeof(both));
  return both;
}

// The operand as the vectors read it: rounding on the way is left to the loops above.
inline bool plain(const Operand& operand) {
  return operand.stored == operand.used;
}

// Draws the keep-bits of columns column .. column+columns-1 of a row, rounded up to whole vectors.
inline void draw_row(const Dropout& dropout, int64_t row, int64_t column, int64_t columns,
                     uint8_t* bits) {
  for (int64_t c = 0; c < columns; c += kDrawnColumns) {
    draw(dropout.seed, static_cast<uint64_t>(row), static_cast<uint64_t>((column + c) / 8),
         dropout.keep, bits + c / 8);
  }
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

template <bool kPairs>
void mask_rows(const Dropout& dropout, int64_t row, int64_t rows, int64_t begin, int64_t end,
               float* units, int64_t stride, uint8_t* bits) {
  const int64_t columns = end - begin;
  for (int64_t i = 0; i < rows; ++i) {
    draw_row(dropout, row + i, begin, columns, bits);
    float* out = units + i * stride;
    if constexpr (kPairs) {
      for (int64_t c = 0; c < columns; c += 2 * kWidth) {
        store(out + c / 2, keep_halves(load(out + c / 2), bits, c));
      }
    } else {
      for (int64_t c = 0; c < columns; c += kWidth) store(out + c, keep(load(out + c), bits, c));
    }
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
