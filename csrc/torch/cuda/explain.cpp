#include "torch/cuda/explain.h"

#include "kernels/plan.h"
#include "torch/choice.h"
#include "torch/cuda/operands.h"

namespace fused_lora::cuda {

Explanation explain(const Example& example, const kernels::Device& device) {
  // Plans look at addresses for their alignment alone. Torch's allocator gives such as this one.
  static char aligned[1] __attribute__((aligned(256)));
  const kernels::Problem& p = example.problem;
  const auto dense = [&](int64_t columns) { return kernels::MatrixView{aligned, columns, 1}; };
  const auto describe = [&](auto& call) {
    call.problem = p;
    call.weight =
        example.weight_transposed ? dense(p.out_features).transposed() : dense(p.in_features);
    call.lora_a = dense(p.in_features);
    call.lora_b = dense(p.rank);
    call.x = dense(p.in_features);
    call.h = aligned;
    if (example.dropout) call.dropout.keep = 1 << 15;
  };
  kernels::ForwardCall forward;
  describe(forward);
  forward.bias = example.bias ? aligned : nullptr;
  forward.y = aligned;
  kernels::BackwardCall backward;
  describe(backward);
  backward.dy = dense(p.out_features);
  backward.dx = backward.dlora_a = backward.dlora_b = aligned;
  if (example.adapter_alone) {
    forward.weight = backward.weight = {};
    forward.bias = nullptr;
    forward.base = aligned;
    forward.base_stride = p.out_features;
  }
  const auto text = [&](ShapeClass shape) {
    if (example.adapter_alone) {
      shape.add_to(torch_dtype(p.dtype));
      shape.in_place = !shape.backward;
    }
    return shape.text();
  };

  const auto forward_plan = kernels::plan(forward, device);
  const auto backward_plan = kernels::plan(backward, device);
  return {kernels::describe(forward_plan),
          kernels::describe(backward_plan),
          kernels::presumed_faster(forward_plan),
          kernels::presumed_faster(backward_plan),
          text(forward_class(forward, c10::kCUDA)),
          text(backward_class(backward, {true, true, true}, c10::kCUDA))};
}

}  // namespace fused_lora::cuda
