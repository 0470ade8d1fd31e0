// The compiled kernels, a file an element type.
#pragma once

#include "kernels/lora_gemm/params.h"
#include "kernels/lora_gemm/tile_table.h"

namespace fused_lora::kernels::lora_gemm {

cudaError_t launch_bf16(const Params& params, TileName tile, bool depth_contiguous,
                        cudaStream_t stream);
cudaError_t launch_fp16(const Params& params, TileName tile, bool depth_contiguous,
                        cudaStream_t stream);
// fp16 beside low-rank operands in bf16 pieces.
cudaError_t launch_fp16_masters(const Params& params, TileName tile, bool depth_contiguous,
                                cudaStream_t stream);
cudaError_t launch_tf32(const Params& params, TileName tile, bool depth_contiguous,
                        cudaStream_t stream);

}  // namespace fused_lora::kernels::lora_gemm
