// Launches: the call's arguments become the PTX parameter block, and the Machine runs the kernel.
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "runtime/errors.h"
#include "runtime/launch_shape.h"
#include "runtime/limits.h"
#include "runtime/machine.h"
#include "runtime/registration.h"
#include "runtime/streams.h"

namespace emulator {

namespace {

// What <<<...>>> leaves for the kernel's host function to pick up.
struct Configuration {
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> pushed;

std::vector<uint8_t> pack(const Program& program, void** arguments) {
  std::vector<uint8_t> block(program.parameter_bytes);
  for (size_t i = 0; i < program.parameters.size(); ++i) {
    const Parameter& parameter = program.parameters[i];
    if (arguments == nullptr || arguments[i] == nullptr) {
      throw ArgumentError("args[" + std::to_string(i) + "] is null, " + program.name + " takes " +
                          std::to_string(program.parameters.size()) + " arguments");
    }
    std::memcpy(block.data() + parameter.offset, arguments[i], parameter.bytes);
  }
  return block;
}

// What a device reports of a kernel that did not come to its end. A deadlock is what the watchdog
// ends.
cudaError_t failure(const Finding& finding) {
  switch (finding.check) {
    case Check::OutOfBounds:
      return cudaErrorIllegalAddress;
    case Check::Misaligned:
      return cudaErrorMisalignedAddress;
    case Check::Deadlock:
      return cudaErrorLaunchTimeout;
    case Check::Assertion:
      return finding.ptx_text.find("__assertfail") != std::string::npos ? cudaErrorAssert
                                                                        : cudaErrorLaunchFailure;
    default:
      return cudaErrorLaunchFailure;
  }
}

const LaunchRecord& emulate(const Program& program, const LaunchShape& shape,
                            const std::vector<uint8_t>& parameters) {
  try {
    return Machine::instance().launch(program, shape, parameters.data(), parameters.size());
  } catch (const ArgumentError& error) {  // a limit of the emulator's own; nothing ran
    throw CudaError(cudaErrorNotSupported, error.what());
  } catch (const Unsupported& error) {
    throw CudaError(cudaErrorIllegalInstruction, program.name + ": " + error.what());
  } catch (const Error& error) {
    throw CudaError(cudaErrorLaunchFailure, program.name + ": " + error.what());
  }
}

// Findings alone, of a kernel that came to its end, are the Machine's to keep and no error of the
// call's.
void run(const Kernel& kernel, const LaunchShape& shape, const std::vector<uint8_t>& parameters) {
  const Program& program = kernel.program();
  const LaunchRecord& record = emulate(program, shape, parameters);
  if (record.completed) return;
  if (record.findings.empty()) {
    throw CudaError(cudaErrorLaunchFailure, program.name + " ended early");
  }
  const Finding& last = record.findings.back();
  throw CudaError(failure(last), program.name + ": " + last.message);
}

void launch(const Kernel& kernel, LaunchShape shape, size_t dynamic_shared_bytes, void** arguments,
            cudaStream_t stream) {
  check_launch(Machine::instance().limits, kernel.resources(), shape, dynamic_shared_bytes);
  shape.dynamic_shared_bytes = static_cast<uint32_t>(dynamic_shared_bytes);
  // A copy of the kernel keeps its module for as long as a graph may launch it.
  enqueue(stream, cudaGraphNodeTypeKernel,
          [kernel, shape, parameters = pack(kernel.program(), arguments)] {
            run(kernel, shape, parameters);
          });
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t dynamic_shared_bytes, cudaStream_t stream) {
  return run_call("cudaLaunchKernel", [&] {
    launch(find_kernel(function), shape_of(grid, block), dynamic_shared_bytes, arguments, stream);
  });
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  return run_call("cudaLaunchKernelExC", [&] {
    require(config, "config");
    launch(find_kernel(function), shape_of(*config), config->dynamicSmemBytes, arguments,
           config->stream);
  });
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t dynamic_shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, dynamic_shared_bytes, stream);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                                     CUstream_st* stream) {
  pushed.push_back({grid, block, dynamic_shared_bytes, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic_shared_bytes,
                                       void* stream) {
  return run_in_any_state("__cudaPopCallConfiguration", [&] {
    if (pushed.empty()) throw CudaError(cudaErrorMissingConfiguration, "no <<<...>>> came before");
    const Configuration configuration = pushed.back();
    pushed.pop_back();
    *grid = configuration.grid;
    *block = configuration.block;
    *dynamic_shared_bytes = configuration.dynamic_shared_bytes;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
  });
}
}
