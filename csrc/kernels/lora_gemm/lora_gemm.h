#pragma once

#include "kernels/lora_gemm/tile_table.h"

namespace fused_lora::kernels {

// Why the tensor-core kernel cannot take this stage; null where it can. Looks at the shapes, and at
// x's and weight's strides and alignment: the packed operands are the plan's to place, and out and
// what is added to it may lie anywhere.
const char* lora_gemm_obstacle(const LoraGemm& stage);

// Which of its storage's dimensions W's reduction is: the contiguous one, or the rows.
bool lora_gemm_depth_contiguous(const LoraGemm& stage);

// One launch. The stage has no obstacle.
cudaError_t launch_lora_gemm(const LoraGemm& stage, lora_gemm::TileName tile, cudaStream_t stream);

}  // namespace fused_lora::kernels
