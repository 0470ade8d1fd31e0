// Lays out a workspace. Pure host code.
#pragma once

#include "kernels/alignment.h"
#include "kernels/plan.h"

namespace fused_lora::kernels {

class WorkspaceLayout {
 public:
  Region add(int64_t bytes) {
    constexpr int64_t kAlignment = 256;  // of torch's and CUDA's own allocations
    const Region region = {size_, static_cast<size_t>(bytes)};
    size_ += static_cast<size_t>(ceil_div(bytes, kAlignment) * kAlignment);
    return region;
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

}  // namespace fused_lora::kernels
