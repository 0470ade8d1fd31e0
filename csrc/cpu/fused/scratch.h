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
template <int>
inline F halves(F a, F) {
  return a;
}
inline void zip(F, F, F (&)[2]) {}
#endif

constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kWidth;
constexpr int64_t kUnits = 320;  // of depth in a pass
// Chunks begin where a weight's panel does, and whole bytes of a mask.
constexpr int64_t kChunkStep = 32;
constexpr int64_t kTailUnits = 128;  // of the low-rank product's
// A vector more than the units: rows do not fall on the same sets of the cache, and a mask may be
// applied to whole vectors.
constexpr int64_t kLeftStride = kUnits + 16;
constexpr int64_t kTailStride = kTailUnits + 16;
// Few rows are met by vectors along the depth: fewer sums, and longer chunks.
constexpr int kDotSums = kWidth == 16 ? 16 : 8;
constexpr int64_t kDotUnits = 8 * kWidth * kWidth;  // short runs in short vectors
constexpr int64_t kDotStride = kDotUnits + 16;
// Of the products whose output is thin: rows and columns of vectors along the depth, in
// rank_down.h, and rows and vectors of a strip, in rank_grad.h.
constexpr int kDownRows = 4;
constexpr int kDownColumns = kWidth == 16 ? 4 : 2;
constexpr int64_t kDownUnits = kWidth == 16 ? 512 : kSumUnits * kWidth;
constexpr int64_t kDownStride = kDownUnits + 16;
constexpr int kGradRows = kWidth == 16 ? 8 : 4;
constexpr int kGradVectors = kWidth == 16 ? 3 : 2;

static_assert(kUnits % kChunkStep == 0 && kDownUnits % kChunkStep == 0 &&
                  kDotUnits % kChunkStep == 0,
              "a chunk begins at whole bytes of a mask, for vectors of any width");
static_assert(kColumnStep % kTileColumns == 0 && kPanelRows % kTileColumns == 0,
              "a block begins at a tile, and a tile of a packed weight lies in one panel");
static_assert(kMaskColumns % (8 * kDrawnBytes) == 0, "a row of a mask is of whole draws");

struct alignas(64) Scratch {
  float panels[(kUnits + 1) * kBlockColumns];
  float tail_panels[(kTailUnits + 1) * kBlockColumns];
  float accumulators[kBlockRows * kBlockColumns];
  float tile[kTileRows * kTileColumns];
  float left[kTileRows * kLeftStride];
  float tail_left[kTileRows * kTailStride];
  float start[kBlockColumns];
  float dot_left[kFewRows * kDotStride];
  float dot_tail_left[kFewRows * kTailStride];
  float dot_tail_right[kDotSums * kTailStride];
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
