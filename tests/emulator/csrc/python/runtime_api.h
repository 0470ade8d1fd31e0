// What Python asks of the stand-in CUDA runtime beyond the CUDA calls themselves.
#pragma once

extern "C" {
// Why the last CUDA call that failed did so, naming the call, the code and the argument; "" when
// none did. Valid until the next call.
__attribute__((visibility("default"))) const char* emulator_runtime_last_message();

// Destroys every stream, event and graph, drops captures, and forgets errors, those that corrupt
// the context included. Modules, memory and function attributes stay.
__attribute__((visibility("default"))) void emulator_runtime_reset();
}
