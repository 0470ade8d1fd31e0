#include "runtime/registration.h"

#include <cstdio>
#include <memory>
#include <vector>

#include "runtime/errors.h"
#include "runtime/machine.h"

namespace emulator {

namespace {

struct Registry {
  std::map<void**, std::shared_ptr<Module>> modules;       // by the handle that the host code holds
  std::map<const void*, std::unique_ptr<Kernel>> kernels;  // by host function
  std::map<const void*, DeviceVariable> variables;         // by host variable
  std::map<std::string, int> replacements;                 // the Machine's handles, by kernel
};

// Never destroyed: host code unregisters its fat binaries while the process exits.
Registry& registry() {
  static Registry& registry = *new Registry;
  return registry;
}

cudaKernel_t handle_of(Kernel& kernel) {
  return reinterpret_cast<cudaKernel_t>(&kernel);
}

const std::shared_ptr<Module>& find_module(void** handle) {
  const auto found = registry().modules.find(handle);
  if (found == registry().modules.end()) {
    throw CudaError(cudaErrorInvalidResourceHandle, "no such fat binary is registered");
  }
  return found->second;
}

}  // namespace

Module::Module(const void* fatbin_wrapper) {
  try {
    fatbin_.emplace(fatbin_wrapper);
  } catch (const std::exception& error) {
    // Each use fails with this error; host code that ignores codes should not fail in silence.
    std::fprintf(stderr, "CUDA emulator: %s\n", error.what());
    refusal_ = std::current_exception();
  }
}

Module::~Module() {
  for (const auto& [ptx, handle] : loaded_) Machine::instance().unload(handle);
}

const Fatbin::Ptx& Module::ptx() const {
  if (refusal_) std::rethrow_exception(refusal_);
  const Limits& limits = Machine::instance().limits;
  return fatbin_->ptx_for(limits.major, limits.minor);
}

int Module::load() {
  const Fatbin::Ptx& ptx = this->ptx();
  const auto found = loaded_.find(&ptx);
  if (found != loaded_.end()) return found->second;
  return loaded_[&ptx] = Machine::instance().load(ptx.text);
}

int Module::ptx_architecture() const {
  return ptx().architecture.number;
}

int Module::registers(const std::string& kernel) const {
  const Limits& limits = Machine::instance().limits;
  return fatbin_ ? fatbin_->registers(kernel, limits.major, limits.minor) : 0;
}

const Program& Kernel::program() const {
  const auto replacement = registry().replacements.find(name);
  const int handle =
      replacement != registry().replacements.end() ? replacement->second : module->load();
  try {
    Program& program = Machine::instance().kernel(handle, name);
    program.registers = module->registers(name);
    return program;
  } catch (const ArgumentError& error) {
    throw CudaError(cudaErrorInvalidDeviceFunction, error.what());
  }
}

KernelResources Kernel::resources() const {
  const Program& program = this->program();
  KernelResources resources;
  resources.registers = program.registers;
  resources.static_shared_bytes = program.static_shared_bytes;
  resources.max_dynamic_shared_bytes =
      max_dynamic_shared_bytes
          ? *max_dynamic_shared_bytes
          : Machine::instance().limits.shared_per_block - resources.static_shared_bytes;
  resources.max_threads = program.max_threads;
  resources.required_threads = program.required_threads;
  return resources;
}

uint64_t DeviceVariable::address() const {
  uint64_t address = 0;
  uint64_t bytes = 0;
  if (!Machine::instance().variable(module->load(), name, &address, &bytes)) {
    throw CudaError(cudaErrorInvalidSymbol, "the PTX has no variable " + name);
  }
  return address;
}

const std::string& ptx_of(const std::string& kernel) {
  for (const auto& [function, registered] : registry().kernels) {
    if (registered->name == kernel) return registered->module->ptx().text;
  }
  throw CudaError(cudaErrorInvalidDeviceFunction, "no kernel " + kernel + " is registered");
}

void replace_kernel(const std::string& kernel, int handle) {
  if (handle == 0) {
    registry().replacements.erase(kernel);
  } else {
    registry().replacements[kernel] = handle;
  }
}

Kernel& find_kernel(const void* function) {
  const auto found = registry().kernels.find(function);
  if (found != registry().kernels.end()) return *found->second;
  for (const auto& [host_function, kernel] : registry().kernels) {
    if (kernel.get() == function) return *kernel;
  }
  throw CudaError(cudaErrorInvalidDeviceFunction, "no kernel is registered for this function");
}

const DeviceVariable& find_variable(const void* symbol) {
  const auto found = registry().variables.find(symbol);
  if (found == registry().variables.end()) {
    throw CudaError(cudaErrorInvalidSymbol, "no device variable is registered for this address");
  }
  return found->second;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  void** handle = nullptr;
  run_in_any_state("__cudaRegisterFatBinary", [&] {
    // So that it outlives the host code's exit handler, which is registered after this call.
    Machine::instance();
    auto module = std::make_shared<Module>(wrapper);
    handle = reinterpret_cast<void**>(module.get());
    registry().modules[handle] = std::move(module);
  });
  return handle;
}

// Everything is ready when its registration returns, and modules load when they are used.
void __cudaRegisterFatBinaryEnd(void** /*module*/) {}
char __cudaInitModule(void** /*module*/) {
  return 1;
}

void __cudaUnregisterFatBinary(void** handle) {
  run_in_any_state("__cudaUnregisterFatBinary", [&] {
    const std::shared_ptr<Module> module = find_module(handle);
    const auto erase_from = [&module](auto& entries, auto module_of) {
      for (auto it = entries.begin(); it != entries.end();) {
        it = module_of(it->second) == module ? entries.erase(it) : std::next(it);
      }
    };
    erase_from(registry().kernels, [](const auto& kernel) { return kernel->module; });
    erase_from(registry().variables, [](const auto& variable) { return variable.module; });
    registry().modules.erase(handle);
  });
}

void __cudaRegisterFunction(void** module, const char* host_function, char* /*device_function*/,
                            const char* name, int /*thread_limit*/, uint3* /*thread*/,
                            uint3* /*block*/, dim3* /*block_shape*/, dim3* /*grid_shape*/,
                            int* /*warp_size*/) {
  run_in_any_state("__cudaRegisterFunction", [&] {
    registry().kernels[host_function] =
        std::make_unique<Kernel>(Kernel{find_module(module), name, std::nullopt});
  });
}

void __cudaRegisterVar(void** module, char* host_variable, char* /*device_variable*/,
                       const char* name, int /*external*/, size_t bytes, int /*constant*/,
                       int /*global*/) {
  run_in_any_state("__cudaRegisterVar", [&] {
    registry().variables[host_variable] = {find_module(module), name, bytes};
  });
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  return run_in_any_state("__cudaGetKernel",
                          [&] { *kernel = handle_of(find_kernel(host_function)); });
}
}
