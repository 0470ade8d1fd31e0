// y of few rows in one launch. See small_rows_sm80.cuh.
#pragma once

#include "kernels/lora_linear.h"

namespace fused_lora::kernels {

// Beyond this many rows two launches are faster: a third tile of rows would read A once more and W
// from L2 once more, and there are multiprocessors enough to make h beside it.
constexpr int64_t kSmallRows = 64;

// Why this call takes two launches; null where one serves. The call's x and W suit the tensor cores
// (lora_gemm has no obstacle).
const char* small_rows_obstacle(const ForwardCall& call);

cudaError_t launch_small_rows(const ForwardCall& call, cudaStream_t stream);

}  // namespace fused_lora::kernels
