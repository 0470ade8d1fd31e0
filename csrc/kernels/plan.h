// A plan's contents. Callers outside csrc/kernels need workspace_bytes and launches alone.
#pragma once

#include <vector>

#include "kernels/lora_gemm/tile_table.h"
#include "kernels/lora_linear.h"
#include "kernels/stages.h"

namespace fused_lora::kernels {

// Why a plain kernel serves a stage; null where a tensor-core kernel does.
using Obstacle = const char*;

// A part of the workspace. Bytes; begins at multiples of 256.
struct Region {
  size_t offset = 0;
  size_t bytes = 0;

  // Null where the region is empty.
  template <typename T = void>
  T* in(void* workspace) const {
    return bytes == 0 ? nullptr : reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
  }
};

// The launch of lora_gemm and what the launch before it packs for it.
struct GemmPlan {
  Obstacle obstacle = nullptr;
  int64_t depth = 0;  // of the frozen product; 0: there is none
  lora_gemm::TileName tile = lora_gemm::TileName::kLarge;
  Region packed_low, packed_factor;  // empty for the plain kernel
  int64_t packed_factor_stride = 0;
};

struct ForwardPlan {
  size_t workspace_bytes = 0;
  int launches = 0;
  int64_t rows = 0;
  Arithmetic arithmetic = Arithmetic::kHalf;
  Device device;
  Obstacle down_obstacle = nullptr;
  GemmPlan gemm;
  Obstacle small_rows_obstacle = nullptr;  // null: one launch, and gemm is not used
};

struct BackwardPlan {
  size_t workspace_bytes = 0;
  int launches = 0;
  int64_t rows = 0;
  Arithmetic arithmetic = Arithmetic::kHalf;
  Device device;
  bool needs_g = false;
  Obstacle down_obstacle = nullptr;
  Region g;  // M×r in the rank dtype
  GemmPlan gemm;
  // g and dB by one read of dy; else the reason why by two.
  Obstacle one_read_obstacle = nullptr;
  int grads = 0;                     // that a launch of rank-grad makes: dA, dB, both or none
  Obstacle grad_obstacle = nullptr;  // of that launch
  int a_splits = 1, b_splits = 1;
  Region a_partials, b_partials;  // empty where there is one split
};

// Calls that run together, in one workspace; the members' own workspace_bytes and launches are not
// set.
template <typename Plan>
struct GroupPlan {
  size_t workspace_bytes = 0;
  int launches = 0;
  std::vector<Plan> calls;
};

// A line a call.
template <typename Plan>
std::string describe(const GroupPlan<Plan>& group) {
  std::string text;
  for (const Plan& plan : group.calls) text += (text.empty() ? "" : "\n") + describe(plan);
  return text;
}

// What every stage of a call has in common.
template <typename Stage, typename Call>
Stage stage_of(const Call& call) {
  const Problem& problem = call.problem;
  Stage stage;
  stage.row_adapters = call.row_adapters;
  stage.arithmetic = arithmetic_of(problem);
  stage.dtype = problem.dtype;
  stage.rows = problem.rows;
  stage.rank = problem.rank;
  return stage;
}

// What all rows of h or g are scaled by, beside what their own adapters say.
template <typename Call>
double common_scaling(const Call& call) {
  return call.row_adapters == nullptr ? call.scaling : 1.0;
}

// Whether mma.sync keeps up with the device's fastest GEMMs at so many rows. Hopper (9.x) and
// data-centre Blackwell (10.x) have wgmma and tcgen05 beside it, which go beyond it where
// arithmetic bounds the GEMM and not W's bytes: from about 150 rows on for mma.sync's 63 % of an
// H100's rate.
bool mma_sync_keeps_up(const Device& device, int64_t rows);

// "rank-down: tensor cores", or "rank-down: plain, because …".
std::string describe_stage(const std::string& name, Obstacle obstacle);

}  // namespace fused_lora::kernels
