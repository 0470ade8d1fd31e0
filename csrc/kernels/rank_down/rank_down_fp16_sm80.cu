#include "kernels/rank_down/launch.cuh"

namespace fused_lora::kernels {

cudaError_t launch_rank_down_fp16_sm80(const RankDown& stage, RankDownTile tile,
                                       FactorSource source, cudaStream_t stream) {
  if (stage.arithmetic == Arithmetic::kHalfMasters) {
    return launch_rank_down_factor<fp16, Arithmetic::kHalfMasters, float>(stage, tile, source,
                                                                          stream);
  }
  return stage.factor_dtype == DType::kFloat32
             ? launch_rank_down_factor<fp16, Arithmetic::kHalf, float>(stage, tile, source, stream)
             : launch_rank_down_factor<fp16, Arithmetic::kHalf, fp16>(stage, tile, source, stream);
}

}  // namespace fused_lora::kernels
