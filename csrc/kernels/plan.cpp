#include "kernels/plan.h"

namespace fused_lora::kernels {

bool mma_sync_keeps_up(const Device& device, int64_t rows) {
  constexpr int64_t kRows = 128;
  const int major = device.compute_capability / 10;
  return (major != 9 && major != 10) || rows <= kRows;
}

std::string describe_stage(const std::string& name, Obstacle obstacle) {
  return obstacle == nullptr ? name + ": tensor cores" : name + ": plain, because " + obstacle;
}

}  // namespace fused_lora::kernels
