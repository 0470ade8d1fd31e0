#include "python/runtime_api.h"

#include "runtime/errors.h"
#include "runtime/streams.h"

const char* emulator_runtime_last_message() {
  return emulator::last_message();
}

void emulator_runtime_reset() {
  emulator::reset_streams();
  emulator::reset_graphs();
  emulator::reset_errors();
}
