#include "kernels/rank_down/launch.cuh"

namespace fused_lora::kernels {

cudaError_t launch_rank_down_fp16_sm80(const RankDownLaunch& launch, cudaStream_t stream) {
  const RankDown& stage = launch.stages[0];
  if (stage.arithmetic == Arithmetic::kHalfMasters) {
    return launch_rank_down_factor<fp16, Arithmetic::kHalfMasters, float>(launch, stream);
  }
  return stage.factor_dtype == DType::kFloat32
             ? launch_rank_down_factor<fp16, Arithmetic::kHalf, float>(launch, stream)
             : launch_rank_down_factor<fp16, Arithmetic::kHalf, fp16>(launch, stream);
}

}  // namespace fused_lora::kernels
