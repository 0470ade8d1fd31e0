// The kernels of a level: one source, compiled once a level with its vector (vector_*.h) before it.
//
// A block of the output is computed in passes over the depth. A pass lays a chunk of `right` out in
// panels of kTileColumns columns, which stay in the second cache, then goes down the rows:
// kTileRows of them are copied to where their elements lie at constant distances, in the first
// cache, and meet every panel. A tile's accumulators are registers; between passes they rest in
// scratch.
//
//     panel     units × kTileColumns    one unit: an element of fp32, or a pair of bf16 in the
//     left      kTileRows × kLeftStride            depth, for the dot product of pairs
//
// Everything here is internal to the level's file, and calls no inline function of a library: what
// such a file emits for sharing would carry the level's instructions to processors without them.
#pragma once

#include "cpu/fused/strips.h"

namespace fused_lora::cpu::fused {
namespace {

template <bool kPairs, bool kTailPairs>
void compute_suitably(const Product& product, const Block& block, Scratch& scratch) {
  if (suits_dots(product, block)) {
    compute_block_of_dots<kPairs, kTailPairs>(product, block, scratch);
  } else if (suits_strips(product, block)) {
    switch (block.row_end - block.row) {
      case 1:
        return compute_strips<1, kPairs, kTailPairs>(product, block, scratch);
      case 2:
        return compute_strips<2, kPairs, kTailPairs>(product, block, scratch);
      case 3:
        return compute_strips<3, kPairs, kTailPairs>(product, block, scratch);
      case 4:
        return compute_strips<4, kPairs, kTailPairs>(product, block, scratch);
    }
  } else {
    compute_block<kPairs, kTailPairs>(product, block, scratch);
  }
}

inline bool of_pairs(const Operand& left, const Operand& right) {
  return kHasPairs && left.used == DType::kBFloat16 && right.used == DType::kBFloat16;
}

void compute(const Product& product, const Block& block, void* memory) {
  Scratch& scratch = *static_cast<Scratch*>(memory);
  const bool pairs = of_pairs(product.left, product.right);
  if constexpr (kHasPairs) {
    if (pairs && of_pairs(product.tail_left, product.tail_right)) {
      return compute_suitably<true, true>(product, block, scratch);
    }
    if (pairs) return compute_suitably<true, false>(product, block, scratch);
  }
  compute_suitably<false, false>(product, block, scratch);
}

constexpr Kernels kKernels = {compute, sizeof(Scratch)};

}  // namespace
}  // namespace fused_lora::cpu::fused
