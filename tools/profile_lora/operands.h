// Device memory for one call of forward and one of backward, filled with numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "kernels/lora_linear.h"
#include "profile_lora/options.h"

namespace fused_lora::profile {

// Throws std::runtime_error with the call that failed, where it stands and CUDA's own words.
void check(cudaError_t error, const char* call, const char* file, int line);
#define FUSED_LORA_CHECK(call) ::fused_lora::profile::check(call, #call, __FILE__, __LINE__)

// Uniform numbers in [-scale, scale), of a fixed seed.
void fill(void* data, kernels::DType dtype, int64_t count, float scale, uint64_t seed);

class Operands {
 public:
  explicit Operands(const Options& options);

  kernels::ForwardCall forward;
  kernels::BackwardCall backward;

  void* allocate(int64_t bytes);

 private:
  struct Free {
    void operator()(void* pointer) const { cudaFree(pointer); }
  };
  void* random(int64_t count, kernels::DType dtype, float scale);

  std::vector<std::unique_ptr<void, Free>> owned_;
};

// The calls of a shape on memory that nobody has: enough for a plan.
void describe_calls(const Options& options, kernels::ForwardCall* forward,
                    kernels::BackwardCall* backward);

}  // namespace fused_lora::profile
