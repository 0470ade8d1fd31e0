// How a runtime call fails: the body throws, and the C boundary turns that into a code and a
// message.
#pragma once

#include <functional>
#include <string>

#include "common/error.h"
#include "runtime/cuda_api.h"

namespace emulator {

class CudaError : public Error {
 public:
  CudaError(cudaError_t code, const std::string& what) : Error(what), code(code) {}
  const char* kind() const override { return "CudaError"; }
  const cudaError_t code;
};

// Runs the body of the runtime call `name`, one call at a time. Whatever it throws becomes the code
// that is returned and that cudaGetLastError gives, and the text of last_message(). After an error
// that corrupts the context no body runs any more, and that error is returned.
cudaError_t run_call(const char* name, const std::function<void()>& body) noexcept;

// The same after an error that corrupts the context too: for what host code does once and
// remembers.
cudaError_t run_in_any_state(const char* name, const std::function<void()>& body) noexcept;

// Throws ArgumentError where the pointer that a call got as `argument` is null.
void require(const void* pointer, const char* argument);

// "cudaFree: cudaErrorInvalidValue (invalid argument): ..." of the last call that failed; empty:
// none did. Valid until the next call fails.
const char* last_message();
void set_last_message(std::string message) noexcept;

// Forgets the last error and heals the context.
void reset_errors();

}  // namespace emulator
