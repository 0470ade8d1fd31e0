// What Python drives: a C interface for ctypes. No exception leaves it: a call that fails returns a
// negative number or null, and emulator_last_error() says why.
#include <map>
#include <string>

#include "common/error.h"
#include "python/json.h"
#include "runtime/errors.h"
#include "runtime/limits.h"
#include "runtime/machine.h"

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

namespace emulator {
namespace {

thread_local std::string last_error;
thread_local std::string answer;

// Runs `body`; on an exception notes it as "Kind\nmessage" and returns `failure`.
template <class Result, class Body>
Result guarded(Result failure, Body body) {
  try {
    return body();
  } catch (const Error& error) {
    last_error = std::string(error.kind()) + "\n" + error.what();
  } catch (const std::exception& error) {
    last_error = std::string("EmulatorError\n") + error.what();
  }
  return failure;
}

const char* keep(const std::string& text) {
  answer = text;
  return answer.c_str();
}

// The device's limits, as for a kernel that opted in to all the shared memory there is.
void check_limits(const Limits& limits, const Program& kernel, const LaunchShape& shape) {
  KernelResources resources;
  resources.static_shared_bytes = kernel.static_shared_bytes;
  resources.max_dynamic_shared_bytes = limits.shared_per_block_optin - kernel.dynamic_shared_offset;
  resources.max_threads = kernel.max_threads;
  resources.required_threads = kernel.required_threads;
  try {
    check_launch(limits, resources, shape, shape.dynamic_shared_bytes);
  } catch (const CudaError& error) {
    throw ArgumentError(std::string("kernel `") + kernel.name + "`: " + error.what());
  }
}

template <class T>
T& choose(const std::map<std::string, T*>& fields, const std::string& name) {
  const auto found = fields.find(name);
  if (found == fields.end()) throw ArgumentError("there is no `" + name + "` to set");
  return *found->second;
}

}  // namespace
}  // namespace emulator

using namespace emulator;

EMULATOR_API const char* emulator_last_error() {
  return last_error.c_str();
}

EMULATOR_API int emulator_set_limit(const char* name, int64_t value) {
  return guarded(-1, [&] {
    Limits& l = Machine::instance().limits;
    const std::map<std::string, int*> narrow = {
        {"major", &l.major},
        {"minor", &l.minor},
        {"multiprocessors", &l.multiprocessors},
        {"max_threads_per_block", &l.max_threads_per_block},
        {"max_threads_per_multiprocessor", &l.max_threads_per_multiprocessor},
        {"max_blocks_per_multiprocessor", &l.max_blocks_per_multiprocessor},
        {"registers_per_multiprocessor", &l.registers_per_multiprocessor},
        {"registers_per_block", &l.registers_per_block}};
    const std::map<std::string, int64_t*> wide = {
        {"shared_per_multiprocessor", &l.shared_per_multiprocessor},
        {"shared_per_block", &l.shared_per_block},
        {"shared_per_block_optin", &l.shared_per_block_optin},
        {"shared_reserved_per_block", &l.shared_reserved_per_block},
        {"l2_bytes", &l.l2_bytes},
        {"memory_bytes", &l.memory_bytes}};
    if (narrow.count(name) != 0) {
      choose(narrow, name) = static_cast<int>(value);
    } else {
      choose(wide, name) = value;
    }
    return 0;
  });
}

EMULATOR_API void emulator_set_device_name(const char* name) {
  Machine::instance().limits.name = name;
}

EMULATOR_API int emulator_set_setting(const char* name, uint64_t value) {
  return guarded(-1, [&] {
    Settings& s = Machine::instance().settings;
    const std::string field = name;
    if (field == "order") {
      s.order = static_cast<Order>(value);
    } else if (field == "seed") {
      s.seed = value;
    } else if (field == "truncating_tensor_cores") {
      s.truncating_tensor_cores = value != 0;
    } else if (field == "check_races") {
      s.check_races = value != 0;
    } else if (field == "max_instructions") {
      s.max_instructions = value;
    } else {
      throw ArgumentError("there is no setting `" + field + "`");
    }
    return 0;
  });
}

EMULATOR_API uint64_t emulator_allocate(uint64_t bytes, const char* name, uint64_t skew) {
  return guarded(uint64_t{0},
                 [&] { return Machine::instance().memory.allocate(bytes, name, skew); });
}

EMULATOR_API int emulator_free(uint64_t address) {
  return guarded(-1, [&] { return Machine::instance().memory.free(address), 0; });
}

EMULATOR_API int emulator_restrict(uint64_t address, int64_t offset, int element_bytes,
                                   int dimensions, const int64_t* shape, const int64_t* strides) {
  return guarded(-1, [&] {
    View view;
    view.offset = offset;
    view.element_bytes = element_bytes;
    view.shape.assign(shape, shape + dimensions);
    view.strides.assign(strides, strides + dimensions);
    Machine::instance().memory.restrict(address, view);
    return 0;
  });
}

EMULATOR_API int emulator_write(uint64_t address, const void* source, uint64_t bytes) {
  return guarded(-1, [&] { return Machine::instance().memory.write(address, source, bytes), 0; });
}

EMULATOR_API int emulator_read(uint64_t address, void* destination, uint64_t bytes) {
  return guarded(-1,
                 [&] { return Machine::instance().memory.read(address, destination, bytes), 0; });
}

EMULATOR_API int emulator_fill(uint64_t address, uint8_t value, uint64_t bytes) {
  return guarded(-1, [&] { return Machine::instance().memory.fill(address, value, bytes), 0; });
}

EMULATOR_API int emulator_set_undefined(uint64_t address, uint64_t bytes) {
  return guarded(-1, [&] { return Machine::instance().memory.set_undefined(address, bytes), 0; });
}

EMULATOR_API int emulator_read_undefined(uint64_t address, uint8_t* destination, uint64_t bytes) {
  return guarded(-1, [&] {
    return Machine::instance().memory.read_undefined(address, destination, bytes), 0;
  });
}

EMULATOR_API int emulator_load(const char* ptx) {
  return guarded(-1, [&] { return Machine::instance().load(ptx); });
}

EMULATOR_API int emulator_unload(int module) {
  return guarded(-1, [&] { return Machine::instance().unload(module), 0; });
}

// ["name", ...]
EMULATOR_API const char* emulator_kernels(int module) {
  return guarded(static_cast<const char*>(nullptr), [&] {
    Json json;
    json.begin_array();
    for (const std::string& name : Machine::instance().kernels(module)) json.value(name);
    json.end_array();
    return keep(json.text());
  });
}

EMULATOR_API const char* emulator_kernel(int module, const char* name) {
  return guarded(static_cast<const char*>(nullptr),
                 [&] { return keep(to_json(Machine::instance().kernel(module, name))); });
}

EMULATOR_API int emulator_variable(int module, const char* name, uint64_t* address,
                                   uint64_t* bytes) {
  return guarded(-1, [&] {
    if (!Machine::instance().variable(module, name, address, bytes)) {
      throw ArgumentError("no .global or .const variable `" + std::string(name) +
                          "` in the module");
    }
    return 0;
  });
}

// `shape`: the grid's three sizes, then the block's. Returns the launch's number.
EMULATOR_API int emulator_launch(int module, const char* name, const uint32_t* shape,
                                 uint32_t dynamic_shared_bytes, const void* parameters,
                                 uint64_t bytes) {
  return guarded(-1, [&] {
    Machine& machine = Machine::instance();
    LaunchShape launch;
    for (int i = 0; i < 3; ++i) {
      launch.grid[i] = shape[i];
      launch.block[i] = shape[3 + i];
    }
    launch.dynamic_shared_bytes = dynamic_shared_bytes;
    const Program& kernel = machine.kernel(module, name);
    check_limits(machine.limits, kernel, launch);
    machine.launch(kernel, launch, parameters, bytes);
    return static_cast<int>(machine.launches.size()) - 1;
  });
}

EMULATOR_API int emulator_launches() {
  return static_cast<int>(Machine::instance().launches.size());
}

EMULATOR_API void emulator_clear_launches() {
  Machine::instance().launches.clear();
}

EMULATOR_API const char* emulator_launch_record(int index) {
  return guarded(static_cast<const char*>(nullptr), [&] {
    const Machine& machine = Machine::instance();
    if (index < 0 || index >= static_cast<int>(machine.launches.size())) {
      throw ArgumentError("there is no launch " + std::to_string(index));
    }
    return keep(to_json(*machine.launches[static_cast<size_t>(index)]));
  });
}
