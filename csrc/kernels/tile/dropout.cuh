// The dropout mask on registers. csrc/common/dropout.h has the rule: one Philox call decides eight
// neighbours of a row, two 16-bit lanes a word.
#pragma once

#include "common/dropout.h"
#include "kernels/lora_linear.h"

namespace fused_lora::kernels {

// Dropout as a kernel uses it: the seed read once.
struct DropoutKey {
  uint64_t seed;
  uint32_t keep;
  uint64_t first_block;

  // The block of the mask that a column of x lies in.
  __device__ __forceinline__ uint64_t block_of(int64_t column) const {
    return first_block + static_cast<uint64_t>(column / kLanes);
  }

  // The words that decide a block's eight columns of a row.
  __device__ __forceinline__ Philox4x32 words(uint64_t row, uint64_t block) const {
    return dropout_words(seed, row, block);
  }
};

__device__ __forceinline__ DropoutKey dropout_key(const Dropout& dropout) {
  return {dropout.active() ? static_cast<uint64_t>(*dropout.seed) : 0, dropout.keep,
          static_cast<uint64_t>(dropout.first_block)};
}

// Whether one element is kept. Its word is selected: indexed at run time, the words would lie in
// memory.
__device__ __forceinline__ bool element_kept(const DropoutKey& key, uint64_t row, int64_t column) {
  const Philox4x32 words = key.words(row, key.block_of(column));
  uint32_t drawn = 0;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    if (column % kLanes == lane) drawn = dropout_lane(words, lane);
  }
  return drawn < key.keep;
}

// A word's two lanes as a mask over two 16-bit elements: all ones where an element is kept.
__device__ __forceinline__ uint32_t pair_mask(uint32_t word, uint32_t keep) {
  return ((word & 0xffffu) < keep ? 0x0000ffffu : 0u) | ((word >> 16) < keep ? 0xffff0000u : 0u);
}

// Masks of the pairs of columns 2i, 2i+1 of a block, i = 0..3.
__device__ __forceinline__ uint4 block_masks(const DropoutKey& key, uint64_t row, uint64_t block) {
  const Philox4x32 words = key.words(row, block);
  return {pair_mask(words.word[0], key.keep), pair_mask(words.word[1], key.keep),
          pair_mask(words.word[2], key.keep), pair_mask(words.word[3], key.keep)};
}

// The words that decide a quad's part of two neighbouring 16×8 accumulator fragments. Lane t of a
// quad holds columns 2t and 2t+1, which word t of a block decides, of rows `row` and `row` + 8 and
// of blocks `block` and `block` + 1. Every lane makes one Philox call for all four, and they
// exchange words: four shuffles against three more calls a lane.
//
// Returns word t of (row, block), (row + 8, block), (row, block + 1), (row + 8, block + 1).
__device__ __forceinline__ uint4 quad_words(const DropoutKey& key, uint64_t row, uint64_t block) {
  constexpr uint32_t kWarp = 0xffffffffu;
  const int t = threadIdx.x % 4;
  const Philox4x32 own = key.words(row + 8 * (t & 1), block + (t >> 1));
  // A 4×4 transpose over the quad, by halves: first between neighbours, then between pairs of
  // lanes.
  const bool odd = (t & 1) != 0, upper = t >= 2;
  const uint32_t low_in = __shfl_xor_sync(kWarp, odd ? own.word[0] : own.word[1], 1);
  const uint32_t high_in = __shfl_xor_sync(kWarp, odd ? own.word[2] : own.word[3], 1);
  const uint32_t low_first = odd ? low_in : own.word[0], low_second = odd ? own.word[1] : low_in;
  const uint32_t high_first = odd ? high_in : own.word[2],
                 high_second = odd ? own.word[3] : high_in;
  const uint32_t first_in = __shfl_xor_sync(kWarp, upper ? low_first : high_first, 2);
  const uint32_t second_in = __shfl_xor_sync(kWarp, upper ? low_second : high_second, 2);
  return upper ? uint4{first_in, second_in, high_first, high_second}
               : uint4{low_first, low_second, first_in, second_in};
}

}  // namespace fused_lora::kernels
