#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "torch/choice.h"

namespace fused_lora::cuda {

// The median times of both, on a stream that does not capture, by events: the host waits for the
// stream.
Times time_in_turns(const std::function<void()>& fused, const std::function<void()>& composed,
                    cudaStream_t stream);

}  // namespace fused_lora::cuda
