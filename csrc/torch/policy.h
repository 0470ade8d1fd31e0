#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fused_lora {

// Adds set_policy and forget_choices: a Python function as the policy of torch/choice.h.
void add_policy_to(pybind11::module_& m);

}  // namespace fused_lora
