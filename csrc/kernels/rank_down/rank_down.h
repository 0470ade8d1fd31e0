#pragma once

#include "kernels/stages.h"

namespace fused_lora::kernels {

// Why the tensor-core kernel cannot take this stage; null where it can.
const char* rank_down_obstacle(const RankDown& stage);

// One launch for up to kMostCalls stages of one X, of the same arithmetic and dtypes: each one's
// out, packed and its partner's packed operand. They have no obstacle.
cudaError_t launch_rank_down(const RankDown* stages, int count, const Device& device,
                             cudaStream_t stream);

}  // namespace fused_lora::kernels
