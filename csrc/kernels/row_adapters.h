// What the rows of a batch use of the stacked adapters, written on the device, where their indices
// are.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/row_adapter.h"

namespace fused_lora::kernels {

// A call's row_adapters, of the adapters' own and of each row's index among them; an index that is
// none, a negative one above all, means no adapter.
struct RowAdaptersCall {
  const int64_t* index = nullptr;        // M, in device memory
  int64_t rows = 0;                      // M
  const RowAdapter* adapters = nullptr;  // in host memory, read before the call returns
  int64_t count = 0;
  RowAdapter* out = nullptr;  // M, in device memory
};
cudaError_t run(const RowAdaptersCall& call, cudaStream_t stream);

}  // namespace fused_lora::kernels
