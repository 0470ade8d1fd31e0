// y in two launches: h from x and A, then the frozen GEMM with h·Bᵀ in its accumulators, or h·Bᵀ
// alone on top of what the frozen layer gave. Few rows take one.
#include "kernels/lora_gemm/plan_gemm.h"
#include "kernels/plain/plain.h"
#include "kernels/rank_down/rank_down.h"
#include "kernels/small_rows/small_rows.h"

namespace fused_lora::kernels {
namespace {

RankDown rank_down_stage(const ForwardCall& call) {
  const Problem& p = call.problem;
  auto stage = stage_of<RankDown>(call);
  stage.factor_dtype = p.adapter_dtype;
  stage.columns = p.in_features;
  stage.x = call.x;
  stage.factor = call.lora_a.transposed();
  stage.alpha =
      static_cast<float>(common_scaling(call) * (call.dropout.active() ? call.dropout.scale : 1));
  stage.dropout = call.dropout;
  stage.out = call.h;
  return stage;
}

LoraGemm gemm_stage(const ForwardCall& call) {
  const Problem& p = call.problem;
  auto stage = stage_of<LoraGemm>(call);
  stage.columns = p.out_features;
  if (call.base == nullptr) {
    stage.depth = p.in_features;
    stage.x = call.x;
    stage.weight = call.weight.transposed();
    stage.bias = call.bias;
  } else {
    stage.addend = call.base;
    stage.addend_stride = call.base_stride;
  }
  stage.out = call.y;
  stage.out_stride = call.y == call.base ? call.base_stride : p.out_features;
  stage.low = call.h;
  stage.factor = call.lora_b.transposed();
  stage.factor_dtype = p.adapter_dtype;
  return stage;
}

}  // namespace

ForwardPlan plan(const ForwardCall& call, const Device& device) {
  ForwardPlan plan;
  plan.arithmetic = arithmetic_of(call.problem);
  plan.device = device;
  plan.rows = call.problem.rows;
  if (call.problem.rows == 0) return plan;
  plan.small_rows_obstacle = lora_gemm_obstacle(gemm_stage(call));
  if (plan.small_rows_obstacle == nullptr) plan.small_rows_obstacle = small_rows_obstacle(call);
  if (plan.small_rows_obstacle == nullptr) {
    plan.launches = 1;
    return plan;
  }
  WorkspaceLayout layout;
  plan.launches = 2;
  plan.down_obstacle = rank_down_obstacle(rank_down_stage(call));
  plan.gemm = plan_gemm(gemm_stage(call), plan.down_obstacle, device, layout);
  plan.workspace_bytes = layout.size();
  return plan;
}

cudaError_t run(const ForwardCall& call, const ForwardPlan& plan, void* workspace,
                cudaStream_t stream) {
  if (plan.launches == 0) return cudaSuccess;
  if (plan.small_rows_obstacle == nullptr) return launch_small_rows(call, stream);
  RankDown down = rank_down_stage(call);
  LoraGemm gemm = gemm_stage(call);
  place_packed(plan.gemm, call.lora_b, call.problem.adapter_dtype, workspace, &gemm, &down);
  const cudaError_t error = plan.down_obstacle == nullptr
                                ? launch_rank_down(down, plan.device, stream)
                                : launch_plain_rank_down(down, stream);
  return error != cudaSuccess ? error : launch(gemm, plan.gemm, stream);
}

bool presumed_faster(const ForwardPlan& plan) {
  return plan.down_obstacle == nullptr && plan.gemm.obstacle == nullptr &&
         (plan.gemm.depth == 0 || mma_sync_keeps_up(plan.device, plan.rows));
}

std::string describe(const ForwardPlan& plan) {
  if (plan.launches == 0) return "nothing to do";
  if (plan.small_rows_obstacle == nullptr) return "few rows in one launch: tensor cores";
  return describe_stage("rank-down", plan.down_obstacle) + "; " +
         describe(plan.gemm, plan.arithmetic);
}

}  // namespace fused_lora::kernels
