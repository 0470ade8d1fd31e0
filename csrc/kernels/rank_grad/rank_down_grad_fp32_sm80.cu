#include "kernels/rank_grad/rank_down_grad_launch.cuh"
#include "kernels/rank_grad/rank_grad_sm80.h"

namespace fused_lora::kernels {

cudaError_t launch_rank_down_grad_fp32_sm80(const RankDownGrad& stage, cudaStream_t stream) {
  return rank_grad::launch_down_grad_ranks<float, Arithmetic::kTf32>(stage, stream);
}

}  // namespace fused_lora::kernels
