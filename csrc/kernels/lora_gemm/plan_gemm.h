// The part of a plan that forward and backward share: lora_gemm and its packed operands.
#pragma once

#include "kernels/lora_gemm/lora_gemm.h"
#include "kernels/plan.h"
#include "kernels/workspace.h"

namespace fused_lora::kernels {

// stage: without its packed operands, which are placed in `layout`. down_obstacle: of the launch
// before, which packs them; the plain one does not.
GemmPlan plan_gemm(const LoraGemm& stage, Obstacle down_obstacle, const Device& device,
                   WorkspaceLayout& layout);

// The stage's packed operands, and the half of RankDown that writes them. factor: extent×rank.
void place_packed(const GemmPlan& plan, const MatrixView& factor, DType factor_dtype,
                  void* workspace, LoraGemm* gemm, RankDown* down);

cudaError_t launch(const LoraGemm& stage, const GemmPlan& plan, cudaStream_t stream);

std::string describe(const GemmPlan& plan, Arithmetic arithmetic);

}  // namespace fused_lora::kernels
