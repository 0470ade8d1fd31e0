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

// The first and the second halves of pairs of bf16, widened.
inline F low_halves(F pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
inline F high_halves(F pairs) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs), high));
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

// Lane i: the sum of the lanes of vectors[i].
inline F sum_lanes(const F (&vectors)[kWidth]) {
  F fours[2];
  for (int i = 0; i < 2; ++i) {
    const F* v = vectors + 4 * i;
    const F ab = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
    const F cd = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
    // In each 128 bits the sums of v[0] .. v[3] over those 128.
    fours[i] = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xEE);
  }
  return _mm256_permute2f128_ps(fours[0], fours[1], 0x20) +
         _mm256_permute2f128_ps(fours[0], fours[1], 0x31);
}

constexpr int kDrawnBytes = 4;
// Calls depend on themselves only, round by round: several rows fill the time.
constexpr int kDrawnRows = 2;

// Four Philox calls. A word is the low half of 64 bits, where the multiplication looks for it; what
// the high halves hold is of no consequence, and so a product's low word needs no extraction.
struct Words {
  __m256i word[4];

  void round(__m256i key0, __m256i key1) {
    const __m256i product0 =
        _mm256_mul_epu32(word[0], _mm256_set1_epi64x(static_cast<int64_t>(0xD2511F53u)));
    const __m256i product1 =
        _mm256_mul_epu32(word[2], _mm256_set1_epi64x(static_cast<int64_t>(0xCD9E8D57u)));
    word[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), word[1]), key0);
    word[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), word[3]), key1);
    word[1] = product1;
    word[3] = product0;
  }
};

// The keep-bits of columns 8*block .. of kRows rows, kDrawnBytes bytes of each: four Philox calls
// to a row. Their order in the lanes is such that the transposed words lie in column order.
template <int kRows>
inline void draw(uint64_t seed, uint64_t row, uint64_t block, uint32_t keep, uint8_t* bits,
                 int64_t row_stride) {
  __m256i key0 = _mm256_set1_epi64x(static_cast<int64_t>(seed & 0xffffffffu));
  __m256i key1 = _mm256_set1_epi64x(static_cast<int64_t>(seed >> 32));
  const __m256i blocks = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(block)),
                                          _mm256_setr_epi64x(0, 1, 2, 3));
  Words rows[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    rows[i] = {{_mm256_set1_epi64x(static_cast<int64_t>(row + i)),
                _mm256_set1_epi64x(static_cast<int64_t>((row + i) >> 32)), blocks,
                _mm256_srli_epi64(blocks, 32)}};
  }
#pragma GCC unroll 1
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i].round(key0, key1);
    key0 = _mm256_add_epi32(key0, _mm256_set1_epi64x(static_cast<int64_t>(0x9E3779B9u)));
    key1 = _mm256_add_epi32(key1, _mm256_set1_epi64x(static_cast<int64_t>(0xBB67AE85u)));
  }
  // Unsigned 16-bit comparison by the signed one, both sides shifted by 2^15.
  const __m256i flip = _mm256_set1_epi16(static_cast<int16_t>(0x8000));
  const __m256i bound = _mm256_xor_si256(_mm256_set1_epi16(static_cast<int16_t>(keep)), flip);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m256i* word = rows[i].word;
    const __m256i word01 = _mm256_blend_epi32(word[0], _mm256_slli_epi64(word[1], 32), 0xAA);
    const __m256i word23 = _mm256_blend_epi32(word[2], _mm256_slli_epi64(word[3], 32), 0xAA);
    const __m256i low = _mm256_unpacklo_epi64(word01, word23);
    const __m256i high = _mm256_unpackhi_epi64(word01, word23);
    // In each 128 bits a block of low and one of high, a byte to a column.
    const __m256i kept =
        _mm256_packs_epi16(_mm256_cmpgt_epi16(bound, _mm256_xor_si256(low, flip)),
                           _mm256_cmpgt_epi16(bound, _mm256_xor_si256(high, flip)));
    const uint32_t mask = static_cast<uint32_t>(_mm256_movemask_epi8(kept));
    __builtin_memcpy(bits + i * row_stride, &mask, sizeof(mask));
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
