// What Python asks of the stand-in CUDA runtime beyond the CUDA calls themselves.
#pragma once

extern "C" {
// Why the last CUDA call that failed did so, naming the call, the code and the argument; "" when
// none did. Valid until the next call.
__attribute__((visibility("default"))) const char* emulator_runtime_last_message();

// Destroys every stream, event and graph, drops captures, and forgets errors, those that corrupt
// the context included. Modules, memory and function attributes stay.
__attribute__((visibility("default"))) void emulator_runtime_reset();

// The PTX that a kernel is launched from on the device that is emulated at present; null where no
// kernel of the name is registered.
__attribute__((visibility("default"))) const char* emulator_runtime_ptx(const char* kernel);

// From now on every launch of this kernel runs the one of its name in a module that emulator_load
// made; with 0 its own again.
__attribute__((visibility("default"))) void emulator_runtime_replace(const char* kernel,
                                                                     int module);
}
