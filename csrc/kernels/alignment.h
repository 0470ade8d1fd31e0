// What the tensor-core kernels demand of an operand's memory. Pure host code.
#pragma once

#include <cstdint>

#include "kernels/lora_linear.h"

namespace fused_lora::kernels {

inline int64_t ceil_div(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// The words with which an operand's obstacles are told.
struct ObstacleWords {
  const char* not_contiguous;
  const char* misaligned;
  const char* ragged;
};
constexpr ObstacleWords kOfX = {
    "the columns of x (or dy) are not contiguous",
    "the rows of x (or dy) do not begin at multiples of 16 bytes",
    "the rows of x (or dy) are not whole multiples of 16 bytes",
};
constexpr ObstacleWords kOfWeight = {
    "the rows of the weight's storage are not contiguous",
    "the rows of the weight's storage do not begin at multiples of 16 bytes",
    "the rows of the weight's storage are not whole multiples of 16 bytes",
};

// Why rows×columns of `matrix` cannot be read in chunks of 16 bytes; null where they can.
inline const char* row_obstacle(const MatrixView& matrix, int64_t rows, int64_t columns,
                                int64_t element_bytes, const ObstacleWords& words) {
  constexpr int64_t kChunk = 16;
  if (matrix.column_stride != 1 && columns > 1) return words.not_contiguous;
  if (columns * element_bytes % kChunk != 0) return words.ragged;
  const bool pitch_fits = rows <= 1 || matrix.row_stride * element_bytes % kChunk == 0;
  if (!pitch_fits || reinterpret_cast<uintptr_t>(matrix.data) % kChunk != 0)
    return words.misaligned;
  return nullptr;
}

}  // namespace fused_lora::kernels
