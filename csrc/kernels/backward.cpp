// dx, dA and dB in at most four launches:
//
//     g (and dB's partial sums, where one read of dy for both is fewer bytes)
//     dx, the frozen GEMM with g·A in its accumulators, or g·A alone
//     dA and dB, or dA alone, split over the rows
//     their partial sums added up
//
// Calls of one x share the last two: x is read once for all their dA. Their dx is one, to which
// each adds its own.
#include <vector>

#include "kernels/batches.h"
#include "kernels/lora_gemm/plan_gemm.h"
#include "kernels/plain/plain.h"
#include "kernels/rank_down/rank_down.h"
#include "kernels/rank_grad/rank_grad.h"

namespace fused_lora::kernels {
namespace {

int64_t rank_bytes(const Problem& p) {
  return bytes_of(rank_dtype(p));
}

RankDown rank_down_stage(const BackwardCall& call) {
  const Problem& p = call.problem;
  auto stage = stage_of<RankDown>(call);
  stage.factor_dtype = p.adapter_dtype;
  stage.columns = p.out_features;
  stage.x = call.dy;
  stage.factor = call.lora_b;
  stage.alpha = static_cast<float>(common_scaling(call));
  return stage;
}

LoraGemm gemm_stage(const BackwardCall& call) {
  const Problem& p = call.problem;
  auto stage = stage_of<LoraGemm>(call);
  stage.columns = p.in_features;
  if (call.weight.data != nullptr) {
    stage.depth = p.out_features;
    stage.x = call.dy;
    stage.weight = call.weight;
  }
  stage.dropout = call.dropout;
  if (call.adds_to_dx) stage.addend = call.dx;
  stage.addend_stride = p.in_features;
  stage.out = call.dx;
  stage.out_stride = p.in_features;
  stage.factor = call.lora_a;
  stage.factor_dtype = p.adapter_dtype;
  return stage;
}

RankGrad grad_of_a(const BackwardCall& call) {
  const Problem& p = call.problem;
  auto stage = stage_of<RankGrad>(call);
  stage.columns = p.in_features;
  stage.x = call.x;
  stage.alpha = call.dropout.active() ? call.dropout.scale : 1.0f;
  stage.dropout = call.dropout;
  stage.transposed = true;
  stage.out = call.dlora_a;
  stage.out_dtype = p.adapter_dtype;
  return stage;
}

RankGrad grad_of_b(const BackwardCall& call) {
  const Problem& p = call.problem;
  auto stage = stage_of<RankGrad>(call);
  stage.columns = p.out_features;
  stage.x = call.dy;
  stage.low = call.h;
  stage.low_stride = call.h_stride;
  stage.out = call.dlora_b;
  stage.out_dtype = p.adapter_dtype;
  return stage;
}

// Both gradients go through one kind of kernel, so that they share a launch.
Obstacle grad_obstacle(const BackwardCall& call, bool with_b) {
  Obstacle obstacle = nullptr;
  if (call.dlora_a != nullptr) obstacle = rank_grad_obstacle(grad_of_a(call));
  if (obstacle == nullptr && with_b) obstacle = rank_grad_obstacle(grad_of_b(call));
  return obstacle;
}

int splits_of(const RankGrad& stage, Obstacle obstacle, const Device& device) {
  return obstacle == nullptr ? rank_grad_splits(&stage, 1, device)
                             : plain_rank_grad_splits(stage, device);
}

bool one_read(const BackwardPlan& plan) {
  return plan.one_read_obstacle == nullptr;
}

Region partials_region(const RankGrad& stage, int splits, WorkspaceLayout& layout) {
  if (splits == 1) return {};
  return layout.add(int64_t{4} * splits * stage.columns * stage.rank);
}

// All but the shares of the gradients, which the calls of a group agree on.
BackwardPlan plan_in(const BackwardCall& call, const Device& device, WorkspaceLayout& layout) {
  const Problem& p = call.problem;
  const bool needs_x = call.dx != nullptr && p.rows > 0;
  const bool needs_a = call.dlora_a != nullptr, needs_b = call.dlora_b != nullptr;
  BackwardPlan plan;
  plan.arithmetic = arithmetic_of(p);
  plan.device = device;
  plan.rows = p.rows;

  plan.needs_g = p.rows > 0 && (needs_x || needs_a);
  plan.one_read_obstacle = "one of g and dB is not needed";
  if (plan.needs_g) {
    plan.down_obstacle = rank_down_obstacle(rank_down_stage(call));
    if (needs_b) {
      plan.one_read_obstacle = rank_down_grad_obstacle({rank_down_stage(call), grad_of_b(call)});
    }
    ++plan.launches;
  }
  if (needs_x) {
    plan.gemm = plan_gemm(gemm_stage(call), plan.down_obstacle, device, layout);
    ++plan.launches;
  }
  if (needs_a || (needs_x && plan.gemm.obstacle != nullptr)) {
    plan.g = layout.add(p.rows * p.rank * rank_bytes(p));
  }
  const bool grads_of_b = needs_b && !one_read(plan);
  plan.grad_obstacle = grad_obstacle(call, grads_of_b);
  plan.grads = (needs_a ? 1 : 0) + (grads_of_b ? 1 : 0);
  return plan;
}

// In how many shares every call's gradients are summed, and where. All dA on tensor cores have the
// same, so that they read a share of x together.
void plan_shares(const BackwardCall* calls, BackwardPlan* plans, int count,
                 WorkspaceLayout& layout) {
  std::vector<RankGrad> of_x;
  for (int i = 0; i < count; ++i) {
    const bool joins = calls[i].dlora_a != nullptr && plans[i].grad_obstacle == nullptr;
    if (joins) of_x.push_back(grad_of_a(calls[i]));
  }
  const int together =
      of_x.empty() ? 1
                   : rank_grad_splits(of_x.data(), static_cast<int>(of_x.size()), plans->device);
  for (int i = 0; i < count; ++i) {
    const BackwardCall& call = calls[i];
    BackwardPlan& plan = plans[i];
    if (call.dlora_a != nullptr) {
      const RankGrad stage = grad_of_a(call);
      plan.a_splits = plan.grad_obstacle == nullptr
                          ? together
                          : splits_of(stage, plan.grad_obstacle, plan.device);
      plan.a_partials = partials_region(stage, plan.a_splits, layout);
    }
    if (call.dlora_b != nullptr) {
      const RankGrad stage = grad_of_b(call);
      plan.b_splits = one_read(plan)
                          ? rank_down_grad_splits({rank_down_stage(call), stage}, plan.device)
                          : splits_of(stage, plan.grad_obstacle, plan.device);
      plan.b_partials = partials_region(stage, plan.b_splits, layout);
    }
  }
}

// A call's stages of rank-grad, in the workspace.
struct Grads {
  RankGrad of_a, of_b;
};
Grads grads_of(const BackwardCall& call, const BackwardPlan& plan, void* workspace) {
  Grads grads = {grad_of_a(call), grad_of_b(call)};
  grads.of_a.low = plan.g.in(workspace);
  grads.of_a.splits = plan.a_splits;
  grads.of_a.partials = plan.a_partials.in<float>(workspace);
  grads.of_b.splits = plan.b_splits;
  grads.of_b.partials = plan.b_partials.in<float>(workspace);
  return grads;
}

// g of a call, beside it dB's partial sums where one read of dy serves both, and then its dx.
cudaError_t run_g_and_dx(const BackwardCall& call, const BackwardPlan& plan, bool adds_to_dx,
                         void* workspace, cudaStream_t stream) {
  RankDown down = rank_down_stage(call);
  LoraGemm gemm = gemm_stage(call);
  gemm.low = down.out = plan.g.in(workspace);
  if (adds_to_dx) gemm.addend = gemm.out;
  if (plan.gemm.packed_low.bytes > 0) {
    place_packed(plan.gemm, call.lora_a.transposed(), call.problem.adapter_dtype, workspace, &gemm,
                 &down);
  }
  cudaError_t error = cudaSuccess;
  if (plan.needs_g) {
    error = one_read(plan)
                ? launch_rank_down_grad({down, grads_of(call, plan, workspace).of_b}, stream)
            : plan.down_obstacle == nullptr ? launch_rank_down(&down, 1, plan.device, stream)
                                            : launch_plain_rank_down(down, stream);
  }
  if (error != cudaSuccess || call.dx == nullptr || call.problem.rows == 0) return error;
  return launch(gemm, plan.gemm, stream);
}

int launches_of_grads(const BackwardPlan* plans, int count) {
  int launches = 0, sums = 0;
  for (const bool plain : {false, true}) {
    int stages = 0;
    for (int i = 0; i < count; ++i) {
      stages += plain == (plans[i].grad_obstacle != nullptr) ? plans[i].grads : 0;
    }
    launches += batches<kMostGrads>(stages);
  }
  for (int i = 0; i < count; ++i) {
    sums += (plans[i].a_partials.bytes > 0 ? 1 : 0) + (plans[i].b_partials.bytes > 0 ? 1 : 0);
  }
  return launches + batches<kMostGrads>(sums);
}

cudaError_t run_together(const BackwardCall* calls, const BackwardPlan* plans, int count,
                         void* workspace, cudaStream_t stream) {
  bool adds_to_dx = false;
  for (int i = 0; i < count; ++i) {
    const cudaError_t error = run_g_and_dx(calls[i], plans[i], adds_to_dx, workspace, stream);
    if (error != cudaSuccess) return error;
    adds_to_dx = adds_to_dx || calls[i].dx != nullptr;
  }
  // Those of x lie side by side, so that they read it together.
  std::vector<RankGrad> by_tensor_cores, plain;
  std::vector<Partials> sums;
  const auto add = [&](const RankGrad& grad, bool launched, const BackwardPlan& plan) {
    if (launched) (plan.grad_obstacle == nullptr ? by_tensor_cores : plain).push_back(grad);
    if (grad.partials == nullptr) return;
    sums.push_back(
        {grad.partials, grad.splits, grad.columns * grad.rank, grad.out, grad.out_dtype});
  };
  for (int i = 0; i < count; ++i) {
    if (calls[i].dlora_a == nullptr) continue;
    add(grads_of(calls[i], plans[i], workspace).of_a, true, plans[i]);
  }
  for (int i = 0; i < count; ++i) {
    if (calls[i].dlora_b == nullptr) continue;
    add(grads_of(calls[i], plans[i], workspace).of_b, !one_read(plans[i]), plans[i]);
  }
  cudaError_t error = launch_in_batches<kMostGrads>(
      by_tensor_cores,
      [&](const RankGrad* stages, int used) { return launch_rank_grad(stages, used, stream); });
  if (error != cudaSuccess) return error;
  error = launch_in_batches<kMostGrads>(plain, [&](const RankGrad* stages, int used) {
    return launch_plain_rank_grad(stages, used, stream);
  });
  if (error != cudaSuccess) return error;
  return launch_in_batches<kMostGrads>(sums, [&](const Partials* outputs, int used) {
    return launch_reduce_partials(outputs, used, stream);
  });
}

}  // namespace

BackwardPlan plan(const BackwardCall& call, const Device& device) {
  WorkspaceLayout layout;
  BackwardPlan plan = plan_in(call, device, layout);
  plan_shares(&call, &plan, 1, layout);
  plan.launches += launches_of_grads(&plan, 1);
  plan.workspace_bytes = layout.size();
  return plan;
}

GroupPlan<BackwardPlan> plan(const BackwardCall* calls, int count, const Device& device) {
  WorkspaceLayout layout;
  GroupPlan<BackwardPlan> group;
  for (int i = 0; i < count; ++i) {
    group.calls.push_back(plan_in(calls[i], device, layout));
    group.launches += group.calls.back().launches;
  }
  plan_shares(calls, group.calls.data(), count, layout);
  group.launches += launches_of_grads(group.calls.data(), count);
  group.workspace_bytes = layout.size();
  return group;
}

cudaError_t run(const BackwardCall& call, const BackwardPlan& plan, void* workspace,
                cudaStream_t stream) {
  return run_together(&call, &plan, 1, workspace, stream);
}

cudaError_t run(const BackwardCall* calls, const GroupPlan<BackwardPlan>& plan, void* workspace,
                cudaStream_t stream) {
  return run_together(calls, plan.calls.data(), static_cast<int>(plan.calls.size()), workspace,
                      stream);
}

bool presumed_faster(const BackwardPlan& plan) {
  return plan.down_obstacle == nullptr && plan.gemm.obstacle == nullptr &&
         plan.grad_obstacle == nullptr &&
         (plan.gemm.depth == 0 || mma_sync_keeps_up(plan.device, plan.rows));
}

std::string describe(const BackwardPlan& plan) {
  if (plan.launches == 0) return "nothing to do";
  std::string text;
  const auto add = [&text](const std::string& part) { text += (text.empty() ? "" : "; ") + part; };
  if (plan.needs_g) {
    add(one_read(plan) ? "rank-down and dB by one read of dy: tensor cores"
                       : describe_stage("rank-down", plan.down_obstacle));
  }
  if (plan.gemm.packed_low.bytes > 0 || plan.gemm.obstacle != nullptr) {
    add(describe(plan.gemm, plan.arithmetic));
  }
  if (plan.grads > 0) add(describe_stage("rank-grad", plan.grad_obstacle));
  return text;
}

}  // namespace fused_lora::kernels
