// Fat binaries, kernels and device variables that loaded host code has made known.
#pragma once

#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "core/program.h"
#include "runtime/cuda_api.h"
#include "runtime/fatbin.h"
#include "runtime/limits.h"

namespace emulator {

// One registered fat binary. Its PTX is parsed when the first of its kernels or variables is used.
class Module {
 public:
  explicit Module(const void* fatbin_wrapper);
  ~Module();

  // The Machine's handle of the PTX for the device that is emulated at present.
  int load();
  int registers(const std::string& kernel) const;
  int ptx_architecture() const;    // 10 · major + minor
  const Fatbin::Ptx& ptx() const;  // for the device that is emulated at present

 private:
  std::optional<Fatbin> fatbin_;
  std::exception_ptr refusal_;                // why there is no fatbin_
  std::map<const Fatbin::Ptx*, int> loaded_;  // to the Machine's handles
};

struct Kernel {
  std::shared_ptr<Module> module;
  std::string name;
  // By cudaFuncSetAttribute.
  std::optional<int> max_dynamic_shared_bytes;
  int shared_memory_carveout = cudaSharedmemCarveoutDefault;  // percent

  const Program& program() const;
  KernelResources resources() const;
};

struct DeviceVariable {
  std::shared_ptr<Module> module;
  std::string name;
  uint64_t bytes;

  // Throws CudaError(cudaErrorInvalidSymbol) where the PTX has no such variable.
  uint64_t address() const;
};

// By the host function's address or by its cudaKernel_t. Throws
// CudaError(cudaErrorInvalidDeviceFunction).
Kernel& find_kernel(const void* function);

// The PTX that a kernel is launched from, by the kernel's name. Throws
// CudaError(cudaErrorInvalidDeviceFunction).
const std::string& ptx_of(const std::string& kernel);

// From now on every launch of this kernel runs the one of its name in a module of the Machine's;
// with 0 its own again.
void replace_kernel(const std::string& kernel, int handle);

// By the host variable's address. Throws CudaError(cudaErrorInvalidSymbol).
const DeviceVariable& find_variable(const void* symbol);

}  // namespace emulator
