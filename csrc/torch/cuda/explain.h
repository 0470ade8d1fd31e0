#pragma once

#include <string>

#include "kernels/lora_linear.h"

namespace fused_lora::cuda {

// Dense operands of a shape: what a layer hands over as a rule.
struct Example {
  kernels::Problem problem;
  bool bias = false;
  bool dropout = false;
  bool weight_transposed = false;  // as Conv1D stores it
  bool adapter_alone = false;      // added in place to what the frozen layer gave
};

// What the kernels would do with it. The texts of the classes name it to the policy.
struct Explanation {
  std::string forward, backward;  // the plans
  bool forward_presumed_faster = false, backward_presumed_faster = false;
  std::string forward_class, backward_class;  // of a layer that needs dx, dlora_a and dlora_b
};
Explanation explain(const Example& example, const kernels::Device& device);

}  // namespace fused_lora::cuda
