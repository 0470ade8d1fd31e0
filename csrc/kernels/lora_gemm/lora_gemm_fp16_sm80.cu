#include "kernels/lora_gemm/launch.cuh"

namespace fused_lora::kernels::lora_gemm {

cudaError_t launch_fp16(const Params& params, TileName tile, bool depth_contiguous,
                        cudaStream_t stream) {
  return launch<fp16, fp16>(params, tile, depth_contiguous, stream);
}

}  // namespace fused_lora::kernels::lora_gemm
