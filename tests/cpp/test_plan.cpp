// Plans are pure host functions: over a grid of shapes, dtypes and devices they keep their
// promises.
#include <vector>

#include "cpp/calls.h"
#include "cpp/check.h"
#include "kernels/plan.h"

namespace fused_lora::testing {
namespace {

using kernels::BackwardPlan;
using kernels::ForwardPlan;
using kernels::GroupPlan;
using kernels::Region;

const Problem kUsual = problem(kinds().front(), 4096, 4096, 4096, 16);
const Device kA100 = devices().front().device;

void check_regions(const std::vector<Region>& regions, size_t workspace_bytes) {
  size_t end = 0;
  for (const Region& region : regions) {
    if (region.bytes == 0) continue;
    CHECK_EQ(region.offset % 256, size_t{0});
    CHECK_LE(end, region.offset);
    end = region.offset + region.bytes;
  }
  CHECK_LE(end, workspace_bytes);
}

TEST(forward_takes_at_most_two_launches) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    const ForwardPlan plan = kernels::plan(forward_call(p, dropout), device);
    CHECK(plan.launches == 1 || plan.launches == 2);
  });
}

TEST(backward_takes_at_most_four_launches) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    const BackwardPlan plan = kernels::plan(backward_call(p, dropout), device);
    CHECK(plan.launches >= 1 && plan.launches <= 4);
  });
}

// Nor more where another gives the frozen product: h or g, and a rank-up.
TEST(without_a_frozen_product_no_call_takes_more_launches_or_memory) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    const ForwardPlan forward = kernels::plan(on_base(forward_call(p, dropout)), device);
    CHECK_EQ(forward.launches, 2);
    CHECK_EQ(forward.gemm.depth, int64_t{0});
    const BackwardCall call = backward_call(p, dropout);
    const BackwardPlan whole = kernels::plan(call, device);
    const BackwardPlan backward = kernels::plan(without_frozen(call), device);
    CHECK_EQ(backward.launches, whole.launches);
    CHECK_EQ(backward.gemm.depth, int64_t{0});
    // x's, W's and y's rows may be in the tensor cores' way; what is added to is never.
    CHECK_EQ(backward.gemm.obstacle == nullptr, backward.down_obstacle == nullptr);
  });
}

TEST(what_is_added_to_changes_no_plan) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    BackwardCall call = backward_call(p, dropout);
    const BackwardPlan alone = kernels::plan(call, device);
    call.adds_to_dx = true;
    const BackwardPlan added = kernels::plan(call, device);
    CHECK_EQ(kernels::describe(added), kernels::describe(alone));
    CHECK_EQ(added.workspace_bytes, alone.workspace_bytes);
  });
}

// Three projections of one x, of different ranks and sizes.
template <typename Call>
std::vector<Call> group_of(const Call& call) {
  std::vector<Call> calls(3, call);
  calls[1].problem.out_features += 8;
  calls[2].problem.rank += 5;
  return calls;
}

template <typename Plan, typename Call>
GroupPlan<Plan> plan_group(const std::vector<Call>& calls, const Device& device) {
  return kernels::plan(calls.data(), static_cast<int>(calls.size()), device);
}

TEST(a_group_shares_what_reads_x_and_no_memory) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    const auto forwards = group_of(forward_call(p, dropout));
    const GroupPlan<ForwardPlan> forward = plan_group<ForwardPlan>(forwards, device);
    int launches = 0, downs = 0;
    std::vector<Region> regions;
    for (const ForwardPlan& plan : forward.calls) {
      launches += plan.launches;
      downs += plan.launches == 2 && plan.down_obstacle == nullptr ? 1 : 0;
      regions.insert(regions.end(), {plan.gemm.packed_low, plan.gemm.packed_factor});
    }
    CHECK_EQ(forward.launches, downs > 1 ? launches - downs + 1 : launches);
    check_regions(regions, forward.workspace_bytes);

    const auto backwards = group_of(backward_call(p, dropout));
    const GroupPlan<BackwardPlan> backward = plan_group<BackwardPlan>(backwards, device);
    CHECK(backward.launches >= 2 * 3 && backward.launches <= 2 * 3 + 3);
    regions.clear();
    for (const BackwardPlan& plan : backward.calls) {
      regions.insert(regions.end(), {plan.gemm.packed_low, plan.gemm.packed_factor, plan.g});
    }
    for (const BackwardPlan& plan : backward.calls) {
      regions.insert(regions.end(), {plan.a_partials, plan.b_partials});
      if (plan.grad_obstacle == nullptr) CHECK_EQ(plan.a_splits, backward.calls[0].a_splits);
    }
    check_regions(regions, backward.workspace_bytes);
  });
}

TEST(a_group_of_one_is_a_call) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    const std::vector<ForwardCall> forward(1, forward_call(p, dropout));
    const ForwardPlan alone = kernels::plan(forward[0], device);
    const auto group = plan_group<ForwardPlan>(forward, device);
    CHECK_EQ(group.launches, alone.launches);
    CHECK_EQ(group.workspace_bytes, alone.workspace_bytes);
    const std::vector<BackwardCall> backward(1, backward_call(p, dropout));
    const BackwardPlan own = kernels::plan(backward[0], device);
    const auto of_one = plan_group<BackwardPlan>(backward, device);
    CHECK_EQ(of_one.launches, own.launches);
    CHECK_EQ(of_one.workspace_bytes, own.workspace_bytes);
    CHECK_EQ(kernels::describe(of_one), kernels::describe(own));
  });
}

TEST(regions_of_the_workspace_are_aligned_and_apart) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    const ForwardPlan forward = kernels::plan(forward_call(p, dropout), device);
    if (forward.launches > 1) {  // one launch needs none
      check_regions({forward.gemm.packed_low, forward.gemm.packed_factor}, forward.workspace_bytes);
    }
    const BackwardPlan backward = kernels::plan(backward_call(p, dropout), device);
    check_regions({backward.gemm.packed_low, backward.gemm.packed_factor, backward.g,
                   backward.a_partials, backward.b_partials},
                  backward.workspace_bytes);
  });
}

// Nothing of the size of x, y or W is ever copied: the workspace is made of terms in the rank.
TEST(the_workspace_is_terms_in_the_rank) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    // Masters take three times the rank, padded to a tile of 32; partial sums are shares of fp32.
    const auto depth = static_cast<size_t>(3 * p.rank + 32);
    const auto rows = static_cast<size_t>(p.rows), in = static_cast<size_t>(p.in_features),
               out = static_cast<size_t>(p.out_features), rank = static_cast<size_t>(p.rank);
    constexpr size_t kPadding = 4096;
    const ForwardPlan forward = kernels::plan(forward_call(p, dropout), device);
    CHECK_LE(forward.workspace_bytes, 4 * (rows + out + 8) * depth + kPadding);
    const BackwardPlan backward = kernels::plan(backward_call(p, dropout), device);
    const size_t packed = 4 * (2 * rows + in + 8) * depth;
    const size_t shares = 4 * rank *
                          (static_cast<size_t>(backward.a_splits) * in +
                           static_cast<size_t>(backward.b_splits) * out);
    CHECK_LE(backward.workspace_bytes, packed + shares + kPadding);
    CHECK_LE(backward.a_splits, 4 * device.multiprocessors);
    CHECK_LE(backward.b_splits, 4 * device.multiprocessors);
  });
}

TEST(a_plan_depends_on_a_pointers_alignment_alone) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    const uintptr_t elsewhere = kAlignedBase + 256;
    const auto forward = [&](uintptr_t base) {
      return kernels::plan(forward_call(p, dropout, base), device);
    };
    CHECK_EQ(kernels::describe(forward(kAlignedBase)), kernels::describe(forward(elsewhere)));
    CHECK_EQ(forward(kAlignedBase).workspace_bytes, forward(elsewhere).workspace_bytes);
    const auto backward = [&](uintptr_t base) {
      return kernels::plan(backward_call(p, dropout, base), device);
    };
    CHECK_EQ(kernels::describe(backward(kAlignedBase)), kernels::describe(backward(elsewhere)));
    CHECK_EQ(backward(kAlignedBase).workspace_bytes, backward(elsewhere).workspace_bytes);
  });
}

TEST(no_rows_launch_nothing_forward_and_zeros_backward) {
  const Problem p = problem(kinds().front(), 0, 64, 64, 8);
  CHECK_EQ(kernels::plan(forward_call(p, false), kA100).launches, 0);
  const BackwardPlan plan = kernels::plan(backward_call(p, false), kA100);
  CHECK(plan.launches >= 1);  // dA and dB are sums over no rows, which must be written
  BackwardCall only_x = backward_call(p, false);
  only_x.dlora_a = only_x.dlora_b = nullptr;
  CHECK_EQ(kernels::plan(only_x, kA100).launches, 0);
}

TEST(what_is_not_asked_for_is_not_launched) {
  const auto launches = [](bool dx, bool da, bool db) {
    BackwardCall call = backward_call(kUsual, true);
    if (!dx) call.dx = nullptr;
    if (!da) call.dlora_a = nullptr;
    if (!db) call.dlora_b = nullptr;
    return kernels::plan(call, kA100).launches;
  };
  const int all = launches(true, true, true);
  CHECK_EQ(launches(false, false, false), 0);
  CHECK_LE(launches(true, false, false), 2);   // g, dx
  CHECK_LE(launches(false, false, true), 2);   // dB and its partial sums: g is not needed
  CHECK_LE(launches(false, true, true), all);  // a first layer
  CHECK(launches(false, true, true) < all);
}

TEST(sizes_beyond_32_bits_do_not_overflow) {
  const Kind& bf16 = kinds().front();
  for (const Problem& p :
       {problem(bf16, int64_t{1} << 33, 64, 64, 16), problem(bf16, 64, int64_t{1} << 31, 64, 16),
        problem(bf16, 64, 64, int64_t{1} << 31, 16)}) {
    const ForwardPlan forward = kernels::plan(forward_call(p, true), kA100);
    CHECK(forward.launches >= 1 && forward.launches <= 2);
    CHECK_LE(forward.workspace_bytes, size_t{1} << 42);
    const BackwardPlan backward = kernels::plan(backward_call(p, true), kA100);
    CHECK(backward.launches >= 1 && backward.launches <= 4);
    CHECK_LE(static_cast<size_t>(p.rows * p.rank), backward.workspace_bytes + 1);  // g alone
    CHECK_LE(backward.workspace_bytes, size_t{1} << 44);
  }
}

}  // namespace
}  // namespace fused_lora::testing

int main() {
  return fused_lora::testing::run_all();
}
