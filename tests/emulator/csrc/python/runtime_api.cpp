#include "python/runtime_api.h"

#include "runtime/errors.h"
#include "runtime/registration.h"
#include "runtime/streams.h"

const char* emulator_runtime_last_message() {
  return emulator::last_message();
}

void emulator_runtime_reset() {
  emulator::reset_streams();
  emulator::reset_graphs();
  emulator::reset_errors();
}

const char* emulator_runtime_ptx(const char* kernel) {
  try {
    return emulator::ptx_of(kernel).c_str();
  } catch (const std::exception&) {
    return nullptr;
  }
}

void emulator_runtime_replace(const char* kernel, int module) {
  emulator::replace_kernel(kernel, module);
}
