#include "kernels/small_rows/small_rows_sm80.cuh"

namespace fused_lora::kernels::small_rows {

cudaError_t launch_bf16(const Params& params, Arithmetic arithmetic, DType adapter_dtype,
                        bool depth_contiguous, int ranks, cudaStream_t stream) {
  return launch<bf16>(params, arithmetic, adapter_dtype, depth_contiguous, ranks, stream);
}

}  // namespace fused_lora::kernels::small_rows
