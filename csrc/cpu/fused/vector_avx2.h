// The vector of the AVX2 level: eight floats, with FMA.
#pragma once

namespace fused_lora::cpu::fused {
namespace {

using F = __m256;

constexpr int kWidth = 8;
constexpr int kTileRows = 6;
// Products are summed in runs of this many, and the runs' sums then: the error of a long sum grows
// with the square root of a run's length. It costs one addition in so many.
constexpr int64_t kSumUnits = 32;

inline F load(const float* from) {
  return _mm256_loadu_ps(from);
}
inline void store(float* to, F value) {
  _mm256_storeu_ps(to, value);
}
// The first `count` lanes, fewer than kWidth, and zeros; reads no further.
inline F load_first(const float* from, int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(from,
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes));
}
inline F splat(float value) {
  return _mm256_set1_ps(value);
}
inline F multiply_add(F a, F b, F c) {
  return _mm256_fmadd_ps(a, b, c);
}

inline F load_bf16(const uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline void store_bf16(uint16_t* to, F value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(to),
      _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
}

// The lanes whose bit, from `column` on, is set; the others become 0.
inline F keep(F value, const uint8_t* bits, int64_t column) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i selected = _mm256_and_si256(_mm256_set1_epi32(bits[column >> 3]), each);
  return _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(selected, each)));
}

inline void transpose(F (&rows)[kWidth]) {
  F pairs[kWidth], fours[kWidth];
  for (int i = 0; i < kWidth; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kWidth; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

constexpr int kDrawnBytes = 8;

struct Product64 {
  __m256i low, high;
};

// The two halves of the eight 64-bit products value * multiplier.
inline Product64 multiply_wide(__m256i value, __m256i multiplier) {
  const __m256i even = _mm256_mul_epu32(value, multiplier);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(value, 32), multiplier);
  return {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA),
          _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA)};
}

// The keep-bits of columns 8*block .. of a row, kDrawnBytes bytes of them: eight Philox calls, one
// in each lane. The order of the counters is such that the transposed words lie in column order.
inline void draw(uint64_t seed, uint64_t row, uint64_t block, uint32_t keep, uint8_t* bits) {
  const __m256i multiplier0 = _mm256_set1_epi32(static_cast<int>(0xD2511F53u));
  const __m256i multiplier1 = _mm256_set1_epi32(static_cast<int>(0xCD9E8D57u));
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  // No lane carries into the high word: that would take 2^35 columns.
  __m256i c0 = _mm256_set1_epi32(static_cast<int>(row));
  __m256i c1 = _mm256_set1_epi32(static_cast<int>(row >> 32));
  __m256i c2 = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(block)),
                                _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  __m256i c3 = _mm256_set1_epi32(static_cast<int>(block >> 32));
  for (int round = 0; round < 10; ++round) {
    const Product64 product0 = multiply_wide(c0, multiplier0);
    const Product64 product1 = multiply_wide(c2, multiplier1);
    const __m256i k0 = _mm256_set1_epi32(static_cast<int>(key0));
    const __m256i k1 = _mm256_set1_epi32(static_cast<int>(key1));
    c0 = _mm256_xor_si256(_mm256_xor_si256(product1.high, c1), k0);
    c2 = _mm256_xor_si256(_mm256_xor_si256(product0.high, c3), k1);
    c1 = product1.low;
    c3 = product0.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const __m256i low01 = _mm256_unpacklo_epi32(c0, c1), high01 = _mm256_unpackhi_epi32(c0, c1);
  const __m256i low23 = _mm256_unpacklo_epi32(c2, c3), high23 = _mm256_unpackhi_epi32(c2, c3);
  const __m256i blocks[4] = {
      _mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
      _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
  // Unsigned 16-bit comparison by the signed one, both sides shifted by 2^15.
  const __m256i flip = _mm256_set1_epi16(static_cast<int16_t>(0x8000));
  const __m256i bound = _mm256_xor_si256(_mm256_set1_epi16(static_cast<int16_t>(keep)), flip);
  for (int i = 0; i < 4; ++i) {
    const __m256i kept = _mm256_cmpgt_epi16(bound, _mm256_xor_si256(blocks[i], flip));
    const __m256i bytes = _mm256_packs_epi16(kept, _mm256_setzero_si256());
    const uint32_t mask = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
    bits[2 * i] = static_cast<uint8_t>(mask);
    bits[2 * i + 1] = static_cast<uint8_t>(mask >> 16);
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
