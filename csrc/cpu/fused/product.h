// One product, as the levels compute it, and the table of functions by which a level is called.
//
//     out = α · (start + keep ∘ (tail_left · tail_right) · tail_scale + left · right)
//
//     left: rows×depth   right: depth×columns   tail_left: rows×tail_depth
//     tail_right: tail_depth×columns            start: columns, or nothing
//
// The tail is the low-rank product, in the same accumulators as the rest; keep, the dropout mask,
// may fall on it (then there is no start), or on one of the long operands.
//
// Included by the files of a level before they switch their instructions on: no standard header
// beyond the fixed-width integers.
#pragma once

#include <cstdint>

#include "cpu/fused/lora_linear.h"

namespace fused_lora::cpu::fused {

struct Operand {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
  DType stored = DType::kFloat32;
  DType used = DType::kFloat32;  // fp32 may be rounded to bf16 on the way
};

struct Output {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
  DType dtype = DType::kFloat32;
};

enum class MaskOn : int32_t { kNothing, kTail, kLeft, kRight };

struct Product {
  int64_t rows = 0, columns = 0, depth = 0, tail_depth = 0;
  Operand left, right, tail_left, tail_right;
  const void* start = nullptr;
  DType start_dtype = DType::kFloat32;
  float alpha = 1.0f;
  float tail_scale = 1.0f;
  MaskOn mask = MaskOn::kNothing;
  Dropout dropout;  // drawn at (row, column) of what the mask falls on
  Output out;
};

// A part of the output: rows row .. row_end-1, columns column .. column_end-1. column is a multiple
// of kColumnStep: of a tile's width at any level.
struct Block {
  int64_t row, row_end, column, column_end;
};

constexpr int64_t kColumnStep = 32;
constexpr int64_t kBlockRows = 512;
constexpr int64_t kBlockColumns = 256;

struct Kernels {
  // Computes a block of at most kBlockRows×kBlockColumns. scratch: scratch_bytes, aligned to 64.
  void (*block)(const Product& product, const Block& block, void* scratch);
  int64_t scratch_bytes;
};

const Kernels& kernels_plain();
// A file's instructions are chosen by GCC's pragma.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FUSED_LORA_X86_LEVELS 1
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
#endif

}  // namespace fused_lora::cpu::fused
