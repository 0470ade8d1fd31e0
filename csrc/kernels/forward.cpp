// y in two launches: h from x and A, then the frozen GEMM with h·Bᵀ in its accumulators, or h·Bᵀ
// alone on top of what the frozen layer gave. Few rows take one. Calls of one x share the first
// launch.
#include <vector>

#include "kernels/batches.h"
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
  stage.out_stride = call.h_stride;
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
  stage.low_stride = call.h_stride;
  stage.factor = call.lora_b.transposed();
  stage.factor_dtype = p.adapter_dtype;
  return stage;
}

// All but workspace_bytes.
ForwardPlan plan_in(const ForwardCall& call, const Device& device, WorkspaceLayout& layout) {
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
  plan.launches = 2;
  plan.down_obstacle = rank_down_obstacle(rank_down_stage(call));
  plan.gemm = plan_gemm(gemm_stage(call), plan.down_obstacle, device, layout);
  return plan;
}

bool stacks(const ForwardPlan& plan) {
  return plan.launches == 2 && plan.down_obstacle == nullptr;
}

// Every h, by as few launches as take them, and what is packed beside them.
cudaError_t run_rank_downs(const ForwardCall* calls, const ForwardPlan* plans, int count,
                           void* workspace, cudaStream_t stream) {
  std::vector<RankDown> stacked;
  for (int i = 0; i < count; ++i) {
    if (plans[i].launches != 2) continue;
    RankDown down = rank_down_stage(calls[i]);
    LoraGemm gemm = gemm_stage(calls[i]);
    place_packed(plans[i].gemm, calls[i].lora_b, calls[i].problem.adapter_dtype, workspace, &gemm,
                 &down);
    if (stacks(plans[i])) {
      stacked.push_back(down);
      continue;
    }
    const cudaError_t error = launch_plain_rank_down(down, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_in_batches<kMostCalls>(stacked, [&](const RankDown* stages, int used) {
    return launch_rank_down(stages, used, plans->device, stream);
  });
}

cudaError_t run_together(const ForwardCall* calls, const ForwardPlan* plans, int count,
                         void* workspace, cudaStream_t stream) {
  cudaError_t error = run_rank_downs(calls, plans, count, workspace, stream);
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    const ForwardCall& call = calls[i];
    const ForwardPlan& plan = plans[i];
    if (plan.launches == 1) error = launch_small_rows(call, stream);
    if (plan.launches != 2) continue;
    RankDown down;
    LoraGemm gemm = gemm_stage(call);
    place_packed(plan.gemm, call.lora_b, call.problem.adapter_dtype, workspace, &gemm, &down);
    error = launch(gemm, plan.gemm, stream);
  }
  return error;
}

}  // namespace

ForwardPlan plan(const ForwardCall& call, const Device& device) {
  WorkspaceLayout layout;
  ForwardPlan plan = plan_in(call, device, layout);
  plan.workspace_bytes = layout.size();
  return plan;
}

GroupPlan<ForwardPlan> plan(const ForwardCall* calls, int count, const Device& device) {
  WorkspaceLayout layout;
  GroupPlan<ForwardPlan> group;
  int stacked = 0;
  for (int i = 0; i < count; ++i) {
    const ForwardPlan plan = plan_in(calls[i], device, layout);
    group.calls.push_back(plan);
    stacked += stacks(plan) ? 1 : 0;
    group.launches += plan.launches;
  }
  group.launches -= stacked - batches<kMostCalls>(stacked);
  group.workspace_bytes = layout.size();
  return group;
}

cudaError_t run(const ForwardCall& call, const ForwardPlan& plan, void* workspace,
                cudaStream_t stream) {
  return run_together(&call, &plan, 1, workspace, stream);
}

cudaError_t run(const ForwardCall* calls, const GroupPlan<ForwardPlan>& plan, void* workspace,
                cudaStream_t stream) {
  return run_together(calls, plan.calls.data(), static_cast<int>(plan.calls.size()), workspace,
                      stream);
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
