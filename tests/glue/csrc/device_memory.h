// A call's operands on the emulated GPU. The tensors of the tests lie in the host's memory, which
// no kernel reaches: inputs are copied to the device as the views that they are, so that the gaps
// between rows are out of bounds; outputs and workspace begin undefined.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/lora_linear.h"

namespace fused_lora::glue {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  kernels::MatrixView input(const char* name, const kernels::MatrixView& host, int64_t rows,
                            int64_t columns, int64_t element_bytes);
  const void* input(const char* name, const void* host, int64_t bytes);
  // An input that is copied back by fetch().
  void* updated(const char* name, const kernels::MatrixView& host, int64_t rows, int64_t columns,
                int64_t element_bytes);
  // To be copied back by fetch(): dense rows, any distance apart. Null where the host's pointer is.
  void* output(const char* name, const kernels::MatrixView& host, int64_t rows, int64_t columns,
               int64_t element_bytes);
  void* output(const char* name, void* host, int64_t bytes);
  // Throws where `host` is not memory for so many bytes, or is any for none.
  void* workspace(void* host, int64_t bytes);

  // Copies the outputs to the host. Throws where a kernel left a byte of them unwritten.
  void fetch();

 private:
  struct Output {
    const char* name;
    uint64_t address;
    char* host;
    int64_t rows, row_bytes, pitch;
  };

  uint64_t allocate(const char* name, int64_t bytes, const void* host);
  // Memory for a view, which alone is accessible.
  uint64_t allocate(const char* name, const kernels::MatrixView& host, int64_t rows,
                    int64_t columns, int64_t element_bytes);

  std::vector<uint64_t> allocations_;
  std::vector<Output> outputs_;
};

}  // namespace fused_lora::glue
