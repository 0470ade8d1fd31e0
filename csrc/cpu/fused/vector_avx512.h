// The vector of the AVX-512 levels: sixteen floats, or sixteen pairs of bf16 where
// FUSED_LORA_PAIRS says that the level has the dot product of pairs.
#pragma once

namespace fused_lora::cpu::fused {
namespace {

using F = __m512;

constexpr int kWidth = 16;
// 28 accumulators, two vectors of the panel and one element of the rows: 31 of 32 registers.
constexpr int kTileRows = 14;
// Products are summed in runs of this many, and the runs' sums then: the error of a long sum grows
// with the square root of a run's length. It costs one addition in so many.
constexpr int64_t kSumUnits = 64;

inline F load(const float* from) {
  return _mm512_loadu_ps(from);
}
inline void store(float* to, F value) {
  _mm512_storeu_ps(to, value);
}
// The first `count` lanes, fewer than kWidth, and zeros; reads no further.
inline F load_first(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
inline F splat(float value) {
  return _mm512_set1_ps(value);
}
inline F multiply_add(F a, F b, F c) {
  return _mm512_fmadd_ps(a, b, c);
}

inline F load_bf16(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(uint16_t* to, F value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
}

// The lanes whose bit, from `column` on, is set; the others become 0.
inline F keep(F value, const uint8_t* bits, int64_t column) {
  uint16_t mask;
  __builtin_memcpy(&mask, bits + (column >> 3), sizeof(mask));
  return _mm512_maskz_mov_ps(mask, value);
}

#if defined(FUSED_LORA_PAIRS)
// c + the dot products of the pairs that a and b hold.
inline F multiply_add_pairs(F a, F b, F c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// keep for 32 neighbours, two in each lane.
inline F keep_halves(F value, const uint8_t* bits, int64_t column) {
  uint32_t mask;
  __builtin_memcpy(&mask, bits + (column >> 3), sizeof(mask));
  return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(mask, _mm512_castps_si512(value)));
}

// Sixteen pairs: `first` in the low halves, `second` in the high ones; both as load_bf16 gives
// them.
inline F interleave(F first, F second) {
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16),
                                             _mm512_castps_si512(second)));
}
#endif

inline void transpose(F (&rows)[kWidth]) {
  F a[kWidth], b[kWidth];
  for (int i = 0; i < kWidth; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kWidth; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
  // b[4q + c]: 128-bit lane l holds column 4l + c of rows 4q .. 4q+3.
  for (int c = 0; c < 4; ++c) {
    const F low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x44);
    const F high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xEE);
    const F low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x44);
    const F high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xEE);
    rows[c] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    rows[8 + c] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[12 + c] = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }
}

constexpr int kDrawnBytes = 16;

struct Product64 {
  __m512i low, high;
};

// The two halves of the sixteen 64-bit products value * multiplier.
inline Product64 multiply_wide(__m512i value, __m512i multiplier) {
  const __m512i even = _mm512_mul_epu32(value, multiplier);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(value, 32), multiplier);
  return {_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)),
          _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd)};
}

// The keep-bits of columns 8*block .. of a row, kDrawnBytes bytes of them: sixteen Philox calls,
// one in each lane. The order of the counters is such that the transposed words lie in column
// order.
inline void draw(uint64_t seed, uint64_t row, uint64_t block, uint32_t keep, uint8_t* bits) {
  const __m512i multiplier0 = _mm512_set1_epi32(static_cast<int>(0xD2511F53u));
  const __m512i multiplier1 = _mm512_set1_epi32(static_cast<int>(0xCD9E8D57u));
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  // No lane carries into the high word: that would take 2^35 columns.
  __m512i c0 = _mm512_set1_epi32(static_cast<int>(row));
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(row >> 32));
  __m512i c2 =
      _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(block)),
                       _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i c3 = _mm512_set1_epi32(static_cast<int>(block >> 32));
  for (int round = 0; round < 10; ++round) {
    const Product64 product0 = multiply_wide(c0, multiplier0);
    const Product64 product1 = multiply_wide(c2, multiplier1);
    const __m512i k0 = _mm512_set1_epi32(static_cast<int>(key0));
    const __m512i k1 = _mm512_set1_epi32(static_cast<int>(key1));
    c0 = _mm512_ternarylogic_epi32(product1.high, c1, k0, 0x96);
    c2 = _mm512_ternarylogic_epi32(product0.high, c3, k1, 0x96);
    c1 = product1.low;
    c3 = product0.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const __m512i low01 = _mm512_unpacklo_epi32(c0, c1), high01 = _mm512_unpackhi_epi32(c0, c1);
  const __m512i low23 = _mm512_unpacklo_epi32(c2, c3), high23 = _mm512_unpackhi_epi32(c2, c3);
  const __m512i blocks[4] = {
      _mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
      _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
  const __m512i bound = _mm512_set1_epi16(static_cast<int16_t>(keep));
  for (int i = 0; i < 4; ++i) {
    const uint32_t mask = _mm512_cmplt_epu16_mask(blocks[i], bound);
    __builtin_memcpy(bits + 4 * i, &mask, sizeof(mask));
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
