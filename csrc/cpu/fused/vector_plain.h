// The vector of the plain level: four floats, by GCC's vector extension, in whatever instructions
// every processor of the target has.
#pragma once

#include <cstdint>

#include "common/dropout.h"

namespace fused_lora::cpu::fused {
namespace {

using F = float __attribute__((vector_size(16)));
using I = int32_t __attribute__((vector_size(16)));

constexpr int kWidth = 4;
constexpr int kTileRows = 6;
// Products are summed in runs of this many, and the runs' sums then: the error of a long sum grows
// with the square root of a run's length. Shorter than with FMA: a product is rounded besides.
constexpr int64_t kSumUnits = 16;

inline F load(const float* from) {
  F value;
  __builtin_memcpy(&value, from, sizeof(F));
  return value;
}
inline void store(float* to, F value) {
  __builtin_memcpy(to, &value, sizeof(F));
}
// The first `count` lanes, fewer than kWidth, and zeros; reads no further.
inline F load_first(const float* from, int64_t count) {
  F value = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t i = 0; i < count; ++i) value[i] = from[i];
  return value;
}
inline F splat(float value) {
  return F{value, value, value, value};
}
inline F multiply_add(F a, F b, F c) {
  return a * b + c;
}

inline F load_bf16(const uint16_t* from) {
  const I bits = {from[0], from[1], from[2], from[3]};
  return reinterpret_cast<F>(bits << 16);
}

// The first and the second halves of pairs of bf16, widened.
inline F low_halves(F pairs) {
  return reinterpret_cast<F>(reinterpret_cast<I>(pairs) << 16);
}
inline F high_halves(F pairs) {
  return reinterpret_cast<F>(reinterpret_cast<I>(pairs) & static_cast<int32_t>(0xffff0000u));
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline void store_bf16(uint16_t* to, F value) {
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t bits = bits_of(value[i]);
    to[i] = value[i] == value[i] ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
  }
}

// The lanes whose bit, from `column` on, is set; the others become 0.
inline F keep(F value, const uint8_t* bits, int64_t column) {
  const int32_t four = bits[column >> 3] >> (column & 4);
  const I selected = I{four, four, four, four} & I{1, 2, 4, 8};
  return reinterpret_cast<F>(reinterpret_cast<I>(value) & (selected != 0));
}

inline void transpose(F (&rows)[kWidth]) {
  const F low01 = __builtin_shuffle(rows[0], rows[1], I{0, 4, 1, 5});
  const F high01 = __builtin_shuffle(rows[0], rows[1], I{2, 6, 3, 7});
  const F low23 = __builtin_shuffle(rows[2], rows[3], I{0, 4, 1, 5});
  const F high23 = __builtin_shuffle(rows[2], rows[3], I{2, 6, 3, 7});
  rows[0] = __builtin_shuffle(low01, low23, I{0, 1, 4, 5});
  rows[1] = __builtin_shuffle(low01, low23, I{2, 3, 6, 7});
  rows[2] = __builtin_shuffle(high01, high23, I{0, 1, 4, 5});
  rows[3] = __builtin_shuffle(high01, high23, I{2, 3, 6, 7});
}

// Lane i: the sum of the lanes of vectors[i].
inline F sum_lanes(const F (&vectors)[kWidth]) {
  F rows[kWidth] = {vectors[0], vectors[1], vectors[2], vectors[3]};
  transpose(rows);
  return (rows[0] + rows[2]) + (rows[1] + rows[3]);
}

constexpr int kDrawnBytes = 1;
constexpr int kDrawnRows = 1;

// The keep-bits of columns 8*block .. of kRows rows, kDrawnBytes bytes of each.
template <int kRows>
inline void draw(uint64_t seed, uint64_t row, uint64_t block, uint32_t keep, uint8_t* bits,
                 int64_t row_stride) {
  for (int i = 0; i < kRows; ++i) {
    const Philox4x32 words = dropout_words(seed, row + i, block);
    uint32_t byte = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      byte |= static_cast<uint32_t>(dropout_lane(words, lane) < keep) << lane;
    }
    bits[i * row_stride] = static_cast<uint8_t>(byte);
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
