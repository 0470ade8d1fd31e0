// Plain SIMT kernels: any stride, any alignment, any dtype; products and sums in fp32.
#pragma once

#include "kernels/stages.h"

namespace fused_lora::kernels {

// As the tensor-core kernels' launchers, without obstacles. `packed` and `partner` are not written,
// and lora_gemm reads `low` and `factor`.
cudaError_t launch_plain_rank_down(const RankDown& stage, cudaStream_t stream);
cudaError_t launch_plain_lora_gemm(const LoraGemm& stage, cudaStream_t stream);
int plain_rank_grad_splits(const RankGrad& stage, const Device& device);
cudaError_t launch_plain_rank_grad(const RankGrad* stages, int count, cudaStream_t stream);

}  // namespace fused_lora::kernels
