#include "kernels/rank_grad/rank_grad_launch.cuh"
#include "kernels/rank_grad/rank_grad_sm80.h"

namespace fused_lora::kernels {

cudaError_t launch_rank_grad_fp32_sm80(const RankGrad* stages, int count, cudaStream_t stream) {
  return rank_grad::launch_ranks<float, Arithmetic::kTf32>(stages, count, stream);
}

}  // namespace fused_lora::kernels
