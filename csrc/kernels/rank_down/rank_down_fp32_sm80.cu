#include "kernels/rank_down/launch.cuh"

namespace fused_lora::kernels {

cudaError_t launch_rank_down_fp32_sm80(const RankDownLaunch& launch, cudaStream_t stream) {
  return launch_rank_down_factor<float, Arithmetic::kTf32, float>(launch, stream);
}

}  // namespace fused_lora::kernels
