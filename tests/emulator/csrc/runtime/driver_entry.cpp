// The driver's functions that launchers look up by name: only the encoder of tensor maps.
#include <cstring>
#include <string>

#include "runtime/errors.h"
#include "runtime/machine.h"
#include "runtime/tensor_map.h"

using namespace emulator;

namespace {

constexpr unsigned kTensorMapVersion = 12000;  // that cuTensorMapEncodeTiled came with

void look_up(const char* symbol, void** function, unsigned version,
             cudaDriverEntryPointQueryResult* status) {
  require(symbol, "symbol");
  require(function, "funcPtr");
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSuccess;
  if (std::strcmp(symbol, "cuTensorMapEncodeTiled") != 0) {
    result = cudaDriverEntryPointSymbolNotFound;
  } else if (version < kTensorMapVersion) {
    result = cudaDriverEntryPointVersionNotSufficent;
  }
  *function = result == cudaDriverEntryPointSuccess
                  ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled)
                  : nullptr;
  if (status != nullptr) *status = result;
}

}  // namespace

extern "C" {

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType data_type, cuuint32_t rank,
                                void* address, const cuuint64_t* size, const cuuint64_t* stride,
                                const cuuint32_t* box, const cuuint32_t* element_stride,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion l2_promotion, CUtensorMapFloatOOBfill fill) {
  const char* const name = "cuTensorMapEncodeTiled: ";
  try {
    if (Machine::instance().limits.major < 9) {
      throw Error("tensor maps need compute capability 9.0");
    }
    if (map == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0) {
      throw ArgumentError("tensorMap is null or not aligned to 64 bytes");
    }
    const TensorMap encoded = encode(data_type, rank, address, size, stride, box, element_stride,
                                     interleave, swizzle, l2_promotion, fill);
    std::memset(map, 0, sizeof *map);
    std::memcpy(map, &encoded, sizeof encoded);
    return CUDA_SUCCESS;
  } catch (const ArgumentError& error) {
    set_last_message(std::string(name) + error.what());
    return CUDA_ERROR_INVALID_VALUE;
  } catch (const std::exception& error) {
    set_last_message(std::string(name) + error.what());
    return CUDA_ERROR_NOT_SUPPORTED;
  }
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function,
                                    unsigned long long /*flags*/,
                                    cudaDriverEntryPointQueryResult* status) {
  return run_call("cudaGetDriverEntryPoint",
                  [&] { look_up(symbol, function, CUDART_VERSION, status); });
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long /*flags*/,
                                             cudaDriverEntryPointQueryResult* status) {
  return run_call("cudaGetDriverEntryPointByVersion",
                  [&] { look_up(symbol, function, version, status); });
}
}
