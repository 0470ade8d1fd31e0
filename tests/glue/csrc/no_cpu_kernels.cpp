// This build serves CPU tensors with the CUDA ops, and leaves out what serves them in the real one.
#include "torch/cpu/module.h"

namespace fused_lora::cpu {

void add_to(pybind11::module_& /*m*/) {}

}  // namespace fused_lora::cpu
