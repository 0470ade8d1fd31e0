// What a plan tells of itself: which kernels serve, and where a plain one does, why.
#include <string>

#include "cpp/calls.h"
#include "cpp/check.h"
#include "kernels/plan.h"

namespace fused_lora::testing {
namespace {

const Device kA100 = devices().front().device;

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(an_aligned_shape_runs_on_tensor_cores) {
  for (const NamedDevice& named : devices()) {
    for (const Kind& kind : kinds()) {
      const Context context(std::string(named.name) + ", " + kind.name);
      const Problem p = problem(kind, 4096, 4096, 4096, 16);
      const auto forward = kernels::plan(forward_call(p, true), named.device);
      const auto backward = kernels::plan(backward_call(p, true), named.device);
      const bool fp32 = kernels::arithmetic_of(p) == kernels::Arithmetic::kFloat32;
      CHECK_EQ(holds(kernels::describe(forward), "plain, because"), fp32);
      CHECK_EQ(holds(kernels::describe(backward), "plain, because"), fp32);
    }
  }
}

// Where nothing was timed: Hopper's and data-centre Blackwell's GEMMs go beyond mma.sync, unless
// W's bytes bound the call.
TEST(tensor_cores_are_presumed_faster_where_mma_sync_keeps_up) {
  for (const NamedDevice& named : devices()) {
    const int major = named.device.compute_capability / 10;
    for (const int64_t rows : {16, 128, 4096}) {
      const Context context(std::string(named.name) + ", " + std::to_string(rows) + " rows");
      const bool expected = rows <= 128 || (major != 9 && major != 10);
      for (const Kind& kind : kinds()) {
        const Problem p = problem(kind, rows, 4096, 4096, 16);
        const bool fp32 = kernels::arithmetic_of(p) == kernels::Arithmetic::kFloat32;
        const auto forward = kernels::plan(forward_call(p, true), named.device);
        const auto backward = kernels::plan(backward_call(p, true), named.device);
        CHECK_EQ(kernels::presumed_faster(forward), expected && !fp32);
        CHECK_EQ(kernels::presumed_faster(backward), expected && !fp32);
      }
    }
  }
}

// A rank-up is bound by the bytes of y or dx on every device.
TEST(without_a_frozen_product_tensor_cores_are_presumed_faster_everywhere) {
  for (const NamedDevice& named : devices()) {
    const Context context(named.name);
    const Problem p = problem(kinds().front(), 4096, 4096, 4096, 16);
    const auto forward = kernels::plan(on_base(forward_call(p, true)), named.device);
    const auto backward = kernels::plan(without_frozen(backward_call(p, true)), named.device);
    CHECK(kernels::presumed_faster(forward));
    CHECK(kernels::presumed_faster(backward));
    for (const std::string& text : {kernels::describe(forward), kernels::describe(backward)}) {
      CHECK(holds(text, "rank-up: tensor cores, tiles of"));
      CHECK(!holds(text, "lora-gemm"));
    }
  }
}

TEST(a_plain_kernel_says_why) {
  const Problem p = problem(kinds().front(), 4096, 4096, 4096, 16);
  ForwardCall misaligned = forward_call(p, false);
  misaligned.x.data = static_cast<const char*>(misaligned.x.data) + 2;
  ForwardCall strided = forward_call(p, false);
  strided.x = {strided.x.data, 1, p.rows};
  const Problem ragged = problem(kinds().front(), 4096, 1023, 4096, 16);
  for (const ForwardCall& call : {misaligned, strided, forward_call(ragged, false)}) {
    const auto plan = kernels::plan(call, kA100);
    const std::string text = kernels::describe(plan);
    const Context context(text);
    CHECK(holds(text, "plain, because"));
    CHECK(holds(text, " x "));  // the operand by its name
    CHECK(!kernels::presumed_faster(plan));
  }
}

TEST(nothing_to_do_says_so) {
  const Problem p = problem(kinds().front(), 0, 64, 64, 8);
  CHECK_EQ(kernels::describe(kernels::plan(forward_call(p, false), kA100)), "nothing to do");
}

TEST(every_plan_is_described) {
  for_each_problem([](const Problem& p, bool dropout, const Device& device) {
    CHECK(!kernels::describe(kernels::plan(forward_call(p, dropout), device)).empty());
    CHECK(!kernels::describe(kernels::plan(backward_call(p, dropout), device)).empty());
  });
}

}  // namespace
}  // namespace fused_lora::testing

int main() {
  return fused_lora::testing::run_all();
}
