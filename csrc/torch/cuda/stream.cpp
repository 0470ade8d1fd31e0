#include "torch/cuda/stream.h"

#include <c10/cuda/CUDAStream.h>

namespace fused_lora::cuda {

cudaStream_t current_stream(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

}  // namespace fused_lora::cuda
