// The launchers that rank_grad.cpp hands its decisions to: one for each element type of X, in a
// file of its own.
#pragma once

#include "kernels/stages.h"

namespace fused_lora::kernels {

cudaError_t launch_rank_grad_bf16_sm80(const RankGrad* stages, int count, cudaStream_t stream);
cudaError_t launch_rank_grad_fp16_sm80(const RankGrad* stages, int count, cudaStream_t stream);
cudaError_t launch_rank_grad_fp32_sm80(const RankGrad* stages, int count, cudaStream_t stream);

// blocks: splits, one for each slice of the rows.
cudaError_t launch_rank_down_grad_bf16_sm80(const RankDownGrad& stage, cudaStream_t stream);
cudaError_t launch_rank_down_grad_fp16_sm80(const RankDownGrad& stage, cudaStream_t stream);
cudaError_t launch_rank_down_grad_fp32_sm80(const RankDownGrad& stage, cudaStream_t stream);

}  // namespace fused_lora::kernels
