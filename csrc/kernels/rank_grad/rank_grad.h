#pragma once

#include "kernels/stages.h"

namespace fused_lora::kernels {

// Why the tensor-core kernel cannot take this stage; null where it can.
const char* rank_grad_obstacle(const RankGrad& stage);

// In how many shares of rows to split the stages of one X, so that their blocks fill the device.
int rank_grad_splits(const RankGrad* stages, int count, const Device& device);

// One launch for up to kMostGrads stages of the same arithmetic and dtype. They have no obstacle.
cudaError_t launch_rank_grad(const RankGrad* stages, int count, cudaStream_t stream);

// g and dB by one read of dy. The splits are the shares of rows, fixed by the kernel's tile. dB's
// sums go to grad.partials where there are any, whatever the splits; else, of one split, to
// grad.out.
const char* rank_down_grad_obstacle(const RankDownGrad& stage);
int rank_down_grad_splits(const RankDownGrad& stage, const Device& device);
cudaError_t launch_rank_down_grad(const RankDownGrad& stage, cudaStream_t stream);

// One launch for up to kMostGrads outputs.
cudaError_t launch_reduce_partials(const Partials* outputs, int count, cudaStream_t stream);

}  // namespace fused_lora::kernels
