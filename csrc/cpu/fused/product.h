// One product, as the levels compute it, and the table of functions by which a level is called.
//
//     out = α · (start + keep ∘ (tail_left · tail_right) · tail_scale + left · right)  [ + base ]
//
//     left: rows×depth   right: depth×columns   tail_left: rows×tail_depth
//     tail_right: tail_depth×columns            start: columns, or rows×columns, or nothing
//
// The tail is the low-rank product, in the same accumulators as the rest; keep, the dropout mask,
// may fall on it (then there is no start), or on one of the long operands.
//
// Included by the files of a level before they switch their instructions on: no standard header
// beyond the fixed-width integers.
#pragma once

#include <cstdint>

#include "cpu/fused/lora_linear.h"
#include "cpu/fused/weight_panels.h"

namespace fused_lora::cpu::fused {

// Where element (i, j) lies. The panels are those of weight_panels.h: kPanels is Wᵀ, whose columns
// (rows of W) are in panels; kPanelsTransposed is W itself.
//
//     kStrided            i · row_stride + j · column_stride
//     kPanels             j / 32 · column_stride + fp32: 32 i + j % 32
//                                                  bf16: 64 (i / 2) + 2 (j % 32) + i % 2
//     kPanelsTransposed   element (j, i) of kPanels, whose column_stride is the row_stride here
enum class Layout : int32_t { kStrided, kPanels, kPanelsTransposed };

struct Operand {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
  DType stored = DType::kFloat32;
  Layout layout = Layout::kStrided;
};

struct Output {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
  DType dtype = DType::kFloat32;
};

// The drawn dropout mask: whether (row, column) is kept is bit column % 8 of
// bits[row * row_stride + column / 8]. No bits: all of it is.
struct Mask {
  const uint8_t* bits = nullptr;
  int64_t row_stride = 0;
};

enum class MaskOn : int32_t { kNothing, kTail, kLeft, kRight };

struct Product {
  int64_t rows = 0, columns = 0, depth = 0, tail_depth = 0;
  Operand left, right, tail_left, tail_right;
  const void* start = nullptr;
  DType start_dtype = DType::kFloat32;
  // 0: the same in every row. Else start is fp32, and a row of it can be read to the next multiple
  // of kColumnStep.
  int64_t start_row_stride = 0;
  float alpha = 1.0f;
  float tail_scale = 1.0f;
  MaskOn mask = MaskOn::kNothing;
  Mask drawn;  // at (row, column) of what the mask falls on
  Output out;
  // rows×columns in the output's dtype, which may be the output itself; the columns of both then
  // lie in rows.
  const void* base = nullptr;
  int64_t base_row_stride = 0;
  bool follows = false;  // its base is the output of the product before it
};

// A part of the output: rows row .. row_end-1, columns column .. column_end-1. column is a multiple
// of kColumnStep: of a tile's width at any level.
struct Block {
  int64_t row, row_end, column, column_end;
};

constexpr int64_t kColumnStep = 32;
constexpr int64_t kBlockRows = 512;
constexpr int64_t kBlockColumns = 640;

// Products of few rows have ways and blocks of their own: those stay near W, and read long runs.
constexpr int64_t kFewRows = 16;
constexpr int64_t kFewColumns = 2048;

// A drawn row has room for whole draws, and for whole vectors, at any level.
constexpr int64_t kMaskColumns = 128;

struct Kernels {
  // Draws the mask's rows row .. row_end-1 of `columns` columns, at bits + row * row_stride.
  void (*draw)(const Dropout& dropout, int64_t row, int64_t row_end, int64_t columns, uint8_t* bits,
               int64_t row_stride);
  // Rounds `count` neighbours, `stride` apart, to bf16.
  void (*round)(const float* from, int64_t stride, int64_t count, uint16_t* to);
  // Computes a block of at most kBlockRows×kBlockColumns, or of few rows and kFewColumns. scratch:
  // scratch_bytes, aligned to 64.
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
