#pragma once

#include "kernels/lora_linear.h"

namespace fused_lora::kernels::small_rows {

// Pitches are bytes from one row of a storage to the next, strides elements.
struct Params {
  const void *x, *weight, *lora_a;
  int64_t x_pitch, weight_pitch, lora_a_stride;
  MatrixView lora_b;  // N×r
  const void* bias;   // N, or null
  void *y, *h;
  int64_t h_stride;
  int rows, columns, depth, rank;
  float scaling;
  const RowAdapter* row_adapters;  // rows, or null
};

// The compiled kernels, a file an element type. ranks: 16, 32 or 64, no less than the rank.
cudaError_t launch_bf16(const Params& params, Arithmetic arithmetic, DType adapter_dtype,
                        bool depth_contiguous, int ranks, cudaStream_t stream);
cudaError_t launch_fp16(const Params& params, Arithmetic arithmetic, DType adapter_dtype,
                        bool depth_contiguous, int ranks, cudaStream_t stream);

}  // namespace fused_lora::kernels::small_rows
