// Stages of one kind, a launch for as many as it takes. Pure host code.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

namespace fused_lora::kernels {

// launch(stages, count) for at most kMost stages at a time.
template <int kMost, typename Stage, typename Launch>
cudaError_t launch_in_batches(const std::vector<Stage>& stages, const Launch& launch) {
  const int count = static_cast<int>(stages.size());
  for (int begin = 0; begin < count; begin += kMost) {
    const cudaError_t error = launch(stages.data() + begin, std::min(kMost, count - begin));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// How many launches these are.
template <int kMost>
int batches(int stages) {
  return (stages + kMost - 1) / kMost;
}

}  // namespace fused_lora::kernels
