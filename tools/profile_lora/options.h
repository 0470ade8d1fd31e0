// The command line of profile_lora.
#pragma once

#include <string>

#include "kernels/lora_linear.h"

namespace fused_lora::profile {

struct Options {
  kernels::Problem problem;  // by default 8192×4096→4096, rank 16, bf16
  double dropout = 0.1;
  bool bias = false;
  bool weight_transposed = false;  // W stored in_features×out_features, as Conv1D stores it
  bool base = false;               // another gave the frozen product: y is added to, in place
  bool forward = true, backward = true;
  int warm_up = 10, iterations = 50;
  std::string plan_for;  // a device's name: print its plan and run nothing
};

extern const char* const kUsage;

// Throws std::invalid_argument, whose text names the argument.
Options parse(int count, char** arguments);

// The figures of a device by its short name, such as "a100". Throws std::invalid_argument.
kernels::Device device_named(const std::string& name);

}  // namespace fused_lora::profile
