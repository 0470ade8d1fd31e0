#include "runtime/errors.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>

namespace emulator {

namespace {

struct Description {
  cudaError_t code;
  const char* name;
  const char* text;
};

// Every code that this runtime returns, with the texts of the real one, which callers may look for.
constexpr Description kDescriptions[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidPitchValue, "cudaErrorInvalidPitchValue", "invalid pitch argument"},
    {cudaErrorInvalidSymbol, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection",
     "invalid copy direction for memcpy"},
    {cudaErrorMissingConfiguration, "cudaErrorMissingConfiguration",
     "__global__ function call is not configured"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidKernelImage, "cudaErrorInvalidKernelImage", "device kernel image is invalid"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidPtx, "cudaErrorInvalidPtx", "a PTX JIT compilation failed"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState",
     "the operation cannot be performed in the present state"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorLaunchTimeout, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {cudaErrorAssert, "cudaErrorAssert", "device-side assert triggered"},
    {cudaErrorIllegalInstruction, "cudaErrorIllegalInstruction",
     "an illegal instruction was encountered"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize",
     "a kernel launch error has occurred due to cluster misconfiguration"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

// The errors of which driver_types.h says that the process can do no further work on the device.
constexpr cudaError_t kSticky[] = {
    cudaErrorIllegalAddress,     cudaErrorLaunchTimeout,     cudaErrorAssert,
    cudaErrorIllegalInstruction, cudaErrorMisalignedAddress, cudaErrorLaunchFailure,
};

bool is_sticky(cudaError_t code) {
  return std::find(std::begin(kSticky), std::end(kSticky), code) != std::end(kSticky);
}

const Description* find_description(cudaError_t code) {
  const auto* found = std::find_if(std::begin(kDescriptions), std::end(kDescriptions),
                                   [code](const Description& d) { return d.code == code; });
  return found == std::end(kDescriptions) ? nullptr : found;
}

// Never destroyed: fat binaries unregister themselves while the process exits.
struct State {
  // Recursive: a message may be asked for while a call runs.
  std::recursive_mutex mutex;
  cudaError_t sticky = cudaSuccess;
  std::string message;
};
State& state() {
  static State& state = *new State;
  return state;
}
// "The last error that has been produced by any of the runtime calls in the host thread":
// cudaGetLastError.
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(const char* call, cudaError_t code, const char* what) {
  last_error = code;
  if (is_sticky(code)) state().sticky = code;
  const Description* description = find_description(code);
  state().message =
      std::string(call) + ": " + description->name + " (" + description->text + "): " + what;
  return code;
}

// The code of the exception that is being handled.
cudaError_t fail_by_exception(const char* call) {
  try {
    throw;
  } catch (const CudaError& error) {
    return fail(call, error.code, error.what());
  } catch (const ParseError& error) {
    return fail(call, cudaErrorInvalidPtx, error.what());
  } catch (const Unsupported& error) {
    return fail(call, cudaErrorNotSupported, error.what());
  } catch (const ArgumentError& error) {
    return fail(call, cudaErrorInvalidValue, error.what());
  } catch (const std::bad_alloc& error) {
    return fail(call, cudaErrorMemoryAllocation, error.what());
  } catch (const std::exception& error) {
    return fail(call, cudaErrorUnknown, error.what());
  }
}

}  // namespace

cudaError_t run_call(const char* name, const std::function<void()>& body) noexcept {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  if (state().sticky != cudaSuccess) return last_error = state().sticky;
  return run_in_any_state(name, body);
}

cudaError_t run_in_any_state(const char* name, const std::function<void()>& body) noexcept {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  try {
    body();
    return cudaSuccess;
  } catch (...) {
    return fail_by_exception(name);
  }
}

void require(const void* pointer, const char* argument) {
  if (pointer == nullptr) throw ArgumentError(std::string(argument) + " is null");
}

const char* last_message() {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  return state().message.c_str();
}

void set_last_message(std::string message) noexcept {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().message = std::move(message);
}

void reset_errors() {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  state().sticky = cudaSuccess;
  state().message.clear();
  last_error = cudaSuccess;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  return state().sticky != cudaSuccess ? state().sticky : last_error;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  const auto* description = find_description(error);
  return description == nullptr ? "unrecognized error code" : description->name;
}

const char* cudaGetErrorString(cudaError_t error) {
  const auto* description = find_description(error);
  return description == nullptr ? "unrecognized error code" : description->text;
}

// The versions of the headers that this runtime was compiled with.
cudaError_t cudaRuntimeGetVersion(int* version) {
  return run_call("cudaRuntimeGetVersion", [&] {
    require(version, "runtimeVersion");
    *version = CUDART_VERSION;
  });
}

cudaError_t cudaDriverGetVersion(int* version) {
  return run_call("cudaDriverGetVersion", [&] {
    require(version, "driverVersion");
    *version = CUDA_VERSION;
  });
}
}
