// The dropout rule, shared by every device so that all of them draw the same mask bit for bit.
//
// Element (row, column) is kept where its 16-bit lane is below `keep`:
//
//     words = philox4x32_10(counter = (row, column / 8), key = seed)      4 words of 32 bits
//     lane  = word[(column % 8) / 2] >> (16 * (column % 2))  &  0xffff
//
// One call serves eight neighbours: one call for each element would cost more than the rest of the
// adapter. The keep-probability is therefore rounded to a multiple of 2^-16, and the scale matches
// the rounded value, so that the expectation stays exact.
//
// Torch-free, host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_LORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_LORA_HOST_DEVICE inline
#endif

namespace fused_lora {

struct Philox4x32 {
  uint32_t word[4];
};

// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC'11. The multipliers and the Weyl increments of the key are the paper's.
FUSED_LORA_HOST_DEVICE Philox4x32 philox4x32_10(Philox4x32 counter, uint64_t key) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  constexpr int kRounds = 10;

  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * counter.word[0];
    const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// Columns that one Philox call serves: four words of two 16-bit lanes.
constexpr int kLanes = 8;

// A dropout probability as the mask sees it.
struct DropoutRule {
  uint32_t keep;  // of 65536
  double scale;   // 1 / (the rounded keep-probability); 0 where nothing is kept

  static DropoutRule from_probability(double p) {
    const uint32_t keep = static_cast<uint32_t>((1.0 - p) * 65536.0 + 0.5);
    return {keep, keep == 0 ? 0.0 : 65536.0 / keep};
  }
};

// The words whose lanes decide columns 8*block .. 8*block+7 of a row.
FUSED_LORA_HOST_DEVICE Philox4x32 dropout_words(uint64_t seed, uint64_t row, uint64_t block) {
  return philox4x32_10({{static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                         static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32)}},
                       seed);
}

FUSED_LORA_HOST_DEVICE uint32_t dropout_lane(const Philox4x32& words, int lane) {
  return (words.word[lane >> 1] >> (16 * (lane & 1))) & 0xffffu;
}

}  // namespace fused_lora
