// dx, dA and dB in at most four launches:
//
//     g (and dB's partial sums, where one read of dy for both is fewer bytes)
//     dx, the frozen GEMM with g·A in its accumulators, or g·A alone
//     dA and dB, or dA alone, split over the rows
//     their partial sums added up
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
  return obstacle == nullptr ? rank_grad_splits(stage, device)
                             : plain_rank_grad_splits(stage, device);
}

Region partials_region(const RankGrad& stage, int splits, WorkspaceLayout& layout) {
  if (splits == 1) return {};
  return layout.add(int64_t{4} * splits * stage.columns * stage.rank);
}

}  // namespace

BackwardPlan plan(const BackwardCall& call, const Device& device) {
  const Problem& p = call.problem;
  const bool needs_x = call.dx != nullptr && p.rows > 0;
  const bool needs_a = call.dlora_a != nullptr, needs_b = call.dlora_b != nullptr;
  BackwardPlan plan;
  plan.arithmetic = arithmetic_of(p);
  plan.device = device;
  plan.rows = p.rows;
  WorkspaceLayout layout;

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
  const bool one_read = plan.one_read_obstacle == nullptr;
  const bool grads_of_b = needs_b && !one_read;
  plan.grad_obstacle = grad_obstacle(call, grads_of_b);
  if (needs_a) {
    plan.a_splits = splits_of(grad_of_a(call), plan.grad_obstacle, device);
    plan.a_partials = partials_region(grad_of_a(call), plan.a_splits, layout);
  }
  if (needs_b) {
    plan.b_splits = one_read
                        ? rank_down_grad_splits({rank_down_stage(call), grad_of_b(call)}, device)
                        : splits_of(grad_of_b(call), plan.grad_obstacle, device);
    plan.b_partials = partials_region(grad_of_b(call), plan.b_splits, layout);
  }
  plan.grads = (needs_a ? 1 : 0) + (grads_of_b ? 1 : 0);
  if (plan.grads > 0) ++plan.launches;
  if (plan.a_partials.bytes > 0 || plan.b_partials.bytes > 0) ++plan.launches;
  plan.workspace_bytes = layout.size();
  return plan;
}

cudaError_t run(const BackwardCall& call, const BackwardPlan& plan, void* workspace,
                cudaStream_t stream) {
  const bool one_read = plan.one_read_obstacle == nullptr;
  RankDown down = rank_down_stage(call);
  LoraGemm gemm = gemm_stage(call);
  RankGrad of_a = grad_of_a(call), of_b = grad_of_b(call);
  down.out = plan.g.in(workspace);
  gemm.low = of_a.low = down.out;
  of_a.splits = plan.a_splits;
  of_a.partials = plan.a_partials.in<float>(workspace);
  of_b.splits = plan.b_splits;
  of_b.partials = plan.b_partials.in<float>(workspace);
  if (plan.gemm.packed_low.bytes > 0) {
    place_packed(plan.gemm, call.lora_a.transposed(), call.problem.adapter_dtype, workspace, &gemm,
                 &down);
  }

  cudaError_t error = cudaSuccess;
  if (plan.needs_g) {
    error = one_read                        ? launch_rank_down_grad({down, of_b}, stream)
            : plan.down_obstacle == nullptr ? launch_rank_down(down, plan.device, stream)
                                            : launch_plain_rank_down(down, stream);
    if (error != cudaSuccess) return error;
  }
  if (call.dx != nullptr && call.problem.rows > 0) {
    error = launch(gemm, plan.gemm, stream);
    if (error != cudaSuccess) return error;
  }
  std::array<RankGrad, 2> grads;
  int count = 0;
  if (call.dlora_a != nullptr) grads[count++] = of_a;
  if (call.dlora_b != nullptr && !one_read) grads[count++] = of_b;
  if (count > 0) {
    error = plan.grad_obstacle == nullptr ? launch_rank_grad(grads.data(), count, stream)
                                          : launch_plain_rank_grad(grads.data(), count, stream);
    if (error != cudaSuccess) return error;
  }
  ReducePartials reduce;
  for (const RankGrad& grad : {of_a, of_b}) {
    if (grad.partials == nullptr) continue;
    reduce.outputs[reduce.used++] = {grad.partials, grad.splits, grad.columns * grad.rank, grad.out,
                                     grad.out_dtype};
  }
  return reduce.used > 0 ? launch_reduce_partials(reduce, stream) : cudaSuccess;
}

bool presumed_faster(const BackwardPlan& plan) {
  return plan.down_obstacle == nullptr && plan.gemm.obstacle == nullptr &&
         plan.grad_obstacle == nullptr &&
         (plan.gemm.depth == 0 || mma_sync_keeps_up(plan.device, plan.rows));
}

std::string describe(const BackwardPlan& plan) {
  if (plan.launches == 0) return "nothing to do";
  const bool one_read = plan.one_read_obstacle == nullptr;
  std::string text;
  const auto add = [&text](const std::string& part) { text += (text.empty() ? "" : "; ") + part; };
  if (plan.needs_g) {
    add(one_read ? "rank-down and dB by one read of dy: tensor cores"
                 : describe_stage("rank-down", plan.down_obstacle));
  }
  if (plan.gemm.packed_low.bytes > 0 || plan.gemm.obstacle != nullptr) {
    add(describe(plan.gemm, plan.arithmetic));
  }
  if (plan.grads > 0) add(describe_stage("rank-grad", plan.grad_obstacle));
  return text;
}

}  // namespace fused_lora::kernels
