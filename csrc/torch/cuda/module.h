#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fused_lora::cuda {

// Adds what fused_lora._C has in a CUDA build alone.
void add_to(pybind11::module_& m);

}  // namespace fused_lora::cuda
