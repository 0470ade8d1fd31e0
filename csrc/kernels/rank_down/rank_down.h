#pragma once

#include "kernels/stages.h"

namespace fused_lora::kernels {

// Why the tensor-core kernel cannot take this stage; null where it can.
const char* rank_down_obstacle(const RankDown& stage);

// One launch: out, packed and the partner's packed operand. The stage has no obstacle.
cudaError_t launch_rank_down(const RankDown& stage, const Device& device, cudaStream_t stream);

}  // namespace fused_lora::kernels
