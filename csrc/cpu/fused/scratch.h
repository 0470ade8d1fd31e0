// The sizes of chunks and tiles, and the memory that a thread computes a block in.
#pragma once

namespace fused_lora::cpu::fused {
namespace {

#if defined(FUSED_LORA_PAIRS)
constexpr bool kHasPairs = true;
#else
// Never called: they stand where the kernels of pairs, never instantiated, name them.
constexpr bool kHasPairs = false;
inline F multiply_add_pairs(F, F, F c) {
  return c;
}
inline F keep_halves(F value, const uint8_t*, int64_t) {
  return value;
}
inline F interleave(F first, F) {
  return first;
}
#endif

constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kWidth;
constexpr int64_t kUnits = 384;      // of depth in a pass
constexpr int64_t kTailUnits = 128;  // of the low-rank product's
// A vector more than the units: rows do not fall on the same sets of the cache, and a mask may be
// applied to whole vectors.
constexpr int64_t kLeftStride = kUnits + 16;
constexpr int64_t kTailStride = kTailUnits + 16;
// Few rows are met by vectors along the depth: fewer sums, and longer chunks.
constexpr int64_t kFewRows = 16;
constexpr int kDotSums = kWidth == 16 ? 16 : 8;
constexpr int64_t kDotUnits = 8 * kWidth * kWidth;  // short runs in short vectors
constexpr int64_t kDotStride = kDotUnits + 16;
constexpr int64_t kDrawnColumns = 8 * kDrawnBytes;
constexpr int64_t kBitsStride = kBlockColumns / 8;

static_assert(kUnits % kDrawnColumns == 0 && kDotUnits % kDrawnColumns == 0,
              "a chunk of a masked depth begins at a drawn block");
static_assert(kColumnStep % kTileColumns == 0 && kBlockColumns % kDrawnColumns == 0,
              "a block begins at a tile, and its bits have room for whole vectors of them");

struct alignas(64) Scratch {
  float panels[kUnits * kBlockColumns];
  float tail_panels[kTailUnits * kBlockColumns];
  float accumulators[kBlockRows * kBlockColumns];
  float left[kTileRows * kLeftStride];
  float tail_left[kTileRows * kTailStride];
  float start[kBlockColumns];
  uint8_t tail_bits[kBlockRows * kBitsStride];
  float dot_left[kFewRows * kDotStride];
  float dot_tail_left[kFewRows * kTailStride];
  float dot_tail_right[kDotSums * kTailStride];
  float dot_rest[kDotSums * kWidth];
  uint8_t left_bits[2 * kDotUnits / 8 + 64];
  uint8_t right_bits[2 * kUnits * kBitsStride];
};

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t larger(int64_t a, int64_t b) {
  return a < b ? b : a;
}
inline int64_t parts(int64_t whole, int64_t part) {
  return (whole + part - 1) / part;
}

}  // namespace
}  // namespace fused_lora::cpu::fused
