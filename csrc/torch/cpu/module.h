#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fused_lora::cpu {

// Adds what fused_lora._C says of the CPU's kernels.
void add_to(pybind11::module_& m);

}  // namespace fused_lora::cpu
