// The kernels of a level: one source, compiled once a level with its vector (vector_*.h) before it.
//
// A block of the output is computed in passes over the depth. A pass lays a chunk of `right` out in
// panels of kTileColumns columns, which stay in the second cache (a packed weight's panels are read
// where they lie, if they are of the tiles' units), then goes down the rows:
// kTileRows of them are copied to where their elements lie at constant distances, in the first
// cache, and meet every panel. A tile's accumulators are registers; between passes they rest in
// scratch. Outputs of few columns (rank_down.h), of few rows over a long depth (rank_grad.h), and
// few rows (dots.h, streams.h) have ways of their own.
//
//     panel     units × kTileColumns    one unit: an element of fp32, or a pair of bf16 in the
//     left      kTileRows × kLeftStride            depth, for the dot product of pairs
//
// Everything here is internal to the level's file, and calls no inline function of a library: what
// such a file emits for sharing would carry the level's instructions to processors without them.
#pragma once

#include "cpu/fused/outer.h"
#include "cpu/fused/rank_down.h"
#include "cpu/fused/rank_grad.h"
#include "cpu/fused/streams.h"

namespace fused_lora::cpu::fused {
namespace {

template <bool kPairs, bool kTailPairs>
void compute_suitably(const Product& product, const Block& block, Scratch& scratch) {
  if (suits_outer<kPairs>(product)) {
    compute_outer(product, block, scratch);
  } else if (suits_rank_grad(product)) {
    if (product.mask == MaskOn::kRight) {
      compute_rank_grad<kPairs, true>(product, block, scratch);
    } else {
      compute_rank_grad<kPairs, false>(product, block, scratch);
    }
  } else if (suits_rank_down(product)) {
    compute_rank_down<kPairs>(product, block, scratch);
  } else if (suits_dots(product)) {
    compute_block_of_dots<kPairs, kTailPairs>(product, block, scratch);
  } else if (suits_streams(product)) {
    compute_streams<kPairs, kTailPairs>(product, block, scratch);
  } else {
    compute_block<kPairs, kTailPairs>(product, block, scratch);
  }
}

inline bool of_pairs(const Operand& left, const Operand& right) {
  return kHasPairs && left.stored == DType::kBFloat16 && right.stored == DType::kBFloat16;
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

template <int kRows>
void draw_rows_of(const Dropout& dropout, int64_t row, int64_t columns, uint8_t* bits,
                  int64_t row_stride) {
  for (int64_t c = 0; c < columns; c += 8 * kDrawnBytes) {
    draw<kRows>(dropout.seed, static_cast<uint64_t>(row),
                static_cast<uint64_t>(dropout.first_block + c / 8), dropout.keep,
                bits + row * row_stride + c / 8, row_stride);
  }
}

void draw_rows(const Dropout& dropout, int64_t row, int64_t row_end, int64_t columns, uint8_t* bits,
               int64_t row_stride) {
  for (; row + kDrawnRows <= row_end; row += kDrawnRows) {
    draw_rows_of<kDrawnRows>(dropout, row, columns, bits, row_stride);
  }
  for (; row < row_end; ++row) draw_rows_of<1>(dropout, row, columns, bits, row_stride);
}

void round(const float* from, int64_t stride, int64_t count, uint16_t* to) {
  const int64_t whole = stride == 1 ? count / kWidth * kWidth : 0;
  for (int64_t i = 0; i < whole; i += kWidth) store_bf16(to + i, load(from + i));
  for (int64_t i = whole; i < count; ++i) to[i] = rounded(from[i * stride]);
}

constexpr Kernels kKernels = {draw_rows, round, compute, sizeof(Scratch)};

}  // namespace
}  // namespace fused_lora::cpu::fused
