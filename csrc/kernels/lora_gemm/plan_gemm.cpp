#include "kernels/lora_gemm/plan_gemm.h"

#include "kernels/plain/plain.h"

namespace fused_lora::kernels {

GemmPlan plan_gemm(const LoraGemm& stage, Obstacle down_obstacle, const Device& device,
                   WorkspaceLayout& layout) {
  GemmPlan plan;
  plan.depth = stage.depth;
  plan.obstacle = lora_gemm_obstacle(stage);
  if (plan.obstacle == nullptr) plan.obstacle = down_obstacle;
  if (plan.obstacle != nullptr) return plan;
  plan.tile = lora_gemm::choose_tile(stage.rows, stage.columns, stage.arithmetic, device);
  const int64_t bytes = packed_element_bytes(stage.arithmetic);
  const int64_t depth = packed_rank(stage.arithmetic, stage.rank);
  const bool depth_contiguous = lora_gemm_depth_contiguous(stage);
  constexpr int64_t kChunk = 16;
  const int64_t chunk = kChunk / bytes;
  plan.packed_factor_stride = depth_contiguous ? depth : ceil_div(stage.columns, chunk) * chunk;
  plan.packed_low = layout.add(stage.rows * depth * bytes);
  plan.packed_factor =
      layout.add((depth_contiguous ? stage.columns : depth) * plan.packed_factor_stride * bytes);
  return plan;
}

void place_packed(const GemmPlan& plan, const MatrixView& factor, DType factor_dtype,
                  void* workspace, LoraGemm* gemm, RankDown* down) {
  if (plan.obstacle != nullptr) return;
  down->packed = plan.packed_low.in(workspace);
  down->partner.factor = factor;
  down->partner.factor_dtype = factor_dtype;
  down->partner.extent = gemm->columns;
  down->partner.rank = gemm->rank;
  down->partner.depth_contiguous = lora_gemm_depth_contiguous(*gemm);
  down->partner.stride = plan.packed_factor_stride;
  down->partner.packed = plan.packed_factor.in(workspace);
  gemm->packed_low = down->packed;
  gemm->packed_factor = down->partner.packed;
  gemm->packed_factor_stride = plan.packed_factor_stride;
}

cudaError_t launch(const LoraGemm& stage, const GemmPlan& plan, cudaStream_t stream) {
  return plan.obstacle == nullptr ? launch_lora_gemm(stage, plan.tile, stream)
                                  : launch_plain_lora_gemm(stage, stream);
}

std::string describe(const GemmPlan& plan, Arithmetic arithmetic) {
  const std::string name = plan.depth == 0 ? "rank-up" : "lora-gemm";
  if (plan.obstacle != nullptr) return describe_stage(name, plan.obstacle);
  const lora_gemm::Tile& tile = lora_gemm::tile_of(plan.tile, arithmetic);
  return describe_stage(name, nullptr) + ", tiles of " + std::to_string(tile.rows) + "×" +
         std::to_string(tile.columns) + ", " + std::to_string(tile.stages) + " stages";
}

}  // namespace fused_lora::kernels
