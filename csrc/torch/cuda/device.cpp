#include "torch/cuda/device.h"

#include <c10/util/Exception.h>

#include <mutex>
#include <unordered_map>

namespace fused_lora::cuda {

void check(cudaError_t error, std::string_view doing) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  TORCH_CHECK(false, "lora_linear: ", cudaGetErrorName(error), " (", cudaGetErrorString(error),
              ") from ", doing);
}

const kernels::Device& figures(c10::Device device) {
  static std::mutex mutex;
  static std::unordered_map<c10::DeviceIndex, kernels::Device> known;  // elements do not move
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device.index());
  if (found != known.end()) return found->second;
  kernels::Device asked;
  check(kernels::current_device(&asked), "looking at " + device.str());
  return known.emplace(device.index(), asked).first->second;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "asking whether the stream captures");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace fused_lora::cuda
