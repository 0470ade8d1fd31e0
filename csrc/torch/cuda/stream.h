#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

namespace fused_lora::cuda {

// torch's current stream on a device.
cudaStream_t current_stream(c10::Device device);

}  // namespace fused_lora::cuda
