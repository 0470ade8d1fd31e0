#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

#include <string_view>

#include "kernels/lora_linear.h"

namespace fused_lora::cuda {

// Throws where `error` is one; `doing` says of what, in the words of a message. The runtime forgets
// it then: it would else be found, and thrown again, by whoever looks next.
void check(cudaError_t error, std::string_view doing);

// The figures of a device, which is the current one. Asked for once.
const kernels::Device& figures(c10::Device device);

bool is_capturing(cudaStream_t stream);

}  // namespace fused_lora::cuda
