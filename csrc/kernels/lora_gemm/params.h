// What a lora_gemm kernel is launched with, for host and device.
#pragma once

#include "kernels/lora_linear.h"

namespace fused_lora::kernels::lora_gemm {

// Pitches are bytes from one row of a storage to the next.
struct Params {
  const void *x, *weight, *low, *factor;
  int64_t x_pitch, weight_pitch, low_pitch, factor_pitch;
  const void* bias;                // columns, or null
  const RowAdapter* row_adapters;  // rows, or null
  const void* addend;              // rows×columns, or null
  void* out;                       // rows×columns
  int64_t addend_pitch, out_pitch;
  int rows, columns, depth;
  int rank, parts;  // the packed operands' depth is their product, and zeros to whole tiles
  int group_shift;  // 2^group_shift rows of tiles run together
  Dropout dropout;
};

}  // namespace fused_lora::kernels::lora_gemm
