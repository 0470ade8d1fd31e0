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

// The first and the second halves of pairs of bf16, widened.
inline F low_halves(F pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
inline F high_halves(F pairs) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), high));
}

inline void store_bf16(uint16_t* to, F value) {
#if defined(FUSED_LORA_PAIRS)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
#endif
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

// The 32 first, or second, halves of the pairs of a and then of b.
template <int kSecond>
inline F halves(F a, F b) {
  constexpr uint32_t k = kSecond | (kSecond + 2) << 16;  // of two neighbours
  constexpr uint32_t s = 4 | 4 << 16;                    // to the next two
  const __m512i from = _mm512_setr_epi32(
      k, k + s, k + 2 * s, k + 3 * s, k + 4 * s, k + 5 * s, k + 6 * s, k + 7 * s, k + 8 * s,
      k + 9 * s, k + 10 * s, k + 11 * s, k + 12 * s, k + 13 * s, k + 14 * s, k + 15 * s);
  return _mm512_castsi512_ps(
      _mm512_permutex2var_epi16(_mm512_castps_si512(a), from, _mm512_castps_si512(b)));
}

// Pairs of the neighbours a_i, b_i of 32 bf16 each: the first sixteen, and the others.
inline void zip(F a, F b, F (&pairs)[2]) {
  constexpr uint32_t k = 0 | 32 << 16, s = 1 | 1 << 16;
  const __m512i first = _mm512_setr_epi32(
      k, k + s, k + 2 * s, k + 3 * s, k + 4 * s, k + 5 * s, k + 6 * s, k + 7 * s, k + 8 * s,
      k + 9 * s, k + 10 * s, k + 11 * s, k + 12 * s, k + 13 * s, k + 14 * s, k + 15 * s);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(16 * s));
  const __m512i low = _mm512_castps_si512(a), high = _mm512_castps_si512(b);
  pairs[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, first, high));
  pairs[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, second, high));
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

// Lane i: the sum of the lanes of vectors[i].
inline F sum_lanes(const F (&vectors)[kWidth]) {
  F fours[4];
  for (int i = 0; i < 4; ++i) {
    const F* v = vectors + 4 * i;
    const F ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    const F cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    // In each 128 bits the sums of v[0] .. v[3] over those 128.
    fours[i] = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xEE);
  }
  const F low = _mm512_shuffle_f32x4(fours[0], fours[1], 0x88) +
                _mm512_shuffle_f32x4(fours[0], fours[1], 0xDD);
  const F high = _mm512_shuffle_f32x4(fours[2], fours[3], 0x88) +
                 _mm512_shuffle_f32x4(fours[2], fours[3], 0xDD);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xDD);
}

constexpr int kDrawnBytes = 8;
// Calls depend on themselves only, round by round: several rows fill the time.
constexpr int kDrawnRows = 4;

// Eight Philox calls. A word is the low half of 64 bits, where the multiplication looks for it;
// what the high halves hold is of no consequence, and so a product's low word needs no extraction.
struct Words {
  __m512i word[4];

  void round(__m512i key0, __m512i key1) {
    const __m512i product0 =
        _mm512_mul_epu32(word[0], _mm512_set1_epi64(static_cast<int64_t>(0xD2511F53u)));
    const __m512i product1 =
        _mm512_mul_epu32(word[2], _mm512_set1_epi64(static_cast<int64_t>(0xCD9E8D57u)));
    word[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), word[1], key0, 0x96);
    word[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), word[3], key1, 0x96);
    word[1] = product1;
    word[3] = product0;
  }
};

// The keep-bits of columns 8*block .. of kRows rows, kDrawnBytes bytes of each: eight Philox calls
// to a row. Their order in the lanes is such that the transposed words lie in column order.
template <int kRows>
inline void draw(uint64_t seed, uint64_t row, uint64_t block, uint32_t keep, uint8_t* bits,
                 int64_t row_stride) {
  __m512i key0 = _mm512_set1_epi64(static_cast<int64_t>(seed & 0xffffffffu));
  __m512i key1 = _mm512_set1_epi64(static_cast<int64_t>(seed >> 32));
  const __m512i blocks = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(block)),
                                          _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  Words rows[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    rows[i] = {{_mm512_set1_epi64(static_cast<int64_t>(row + i)),
                _mm512_set1_epi64(static_cast<int64_t>((row + i) >> 32)), blocks,
                _mm512_srli_epi64(blocks, 32)}};
  }
#pragma GCC unroll 1
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i].round(key0, key1);
    key0 = _mm512_add_epi32(key0, _mm512_set1_epi64(static_cast<int64_t>(0x9E3779B9u)));
    key1 = _mm512_add_epi32(key1, _mm512_set1_epi64(static_cast<int64_t>(0xBB67AE85u)));
  }
  const __m512i bound = _mm512_set1_epi16(static_cast<int16_t>(keep));
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m512i* word = rows[i].word;
    const __m512i word01 = _mm512_mask_shuffle_epi32(word[0], 0xAAAA, word[1], _MM_PERM_CCAA);
    const __m512i word23 = _mm512_mask_shuffle_epi32(word[2], 0xAAAA, word[3], _MM_PERM_CCAA);
    const uint64_t first = _mm512_cmplt_epu16_mask(_mm512_unpacklo_epi64(word01, word23), bound);
    const uint64_t second = _mm512_cmplt_epu16_mask(_mm512_unpackhi_epi64(word01, word23), bound);
    const uint64_t mask = first | second << 32;
    __builtin_memcpy(bits + i * row_stride, &mask, sizeof(mask));
  }
}

}  // namespace
}  // namespace fused_lora::cpu::fused
