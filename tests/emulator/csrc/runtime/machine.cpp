#include "runtime/machine.h"

#include "common/error.h"
#include "core/launch.h"
#include "core/program_builder.h"
#include "ptx/program.h"

namespace emulator {

struct Machine::LoadedModule {
  ptx::Module parsed;
  std::map<std::string, uint64_t> globals;
  std::map<std::string, uint64_t> sizes;
  std::map<std::string, std::unique_ptr<Program>> programs;  // made ready at their first use
};

Machine::Machine() = default;
Machine::~Machine() = default;

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

int Machine::load(const std::string& ptx) {
  auto module = std::make_unique<LoadedModule>();
  module->parsed = ptx::parse(ptx);
  for (const ptx::Variable& v : module->parsed.variables) {
    if ((v.space != ptx::Space::Global && v.space != ptx::Space::Constant) || v.is_extern) continue;
    const uint64_t address = memory.allocate(v.bytes, v.name);
    if (v.initial.empty()) {
      memory.fill(address, 0, v.bytes);
    } else {
      memory.write(address, v.initial.data(), v.bytes);
    }
    module->globals[v.name] = address;
    module->sizes[v.name] = v.bytes;
  }
  const int handle = ++next_module_;
  modules_[handle] = std::move(module);
  return handle;
}

Machine::LoadedModule& Machine::module(int handle) const {
  const auto found = modules_.find(handle);
  if (found == modules_.end())
    throw ArgumentError("module " + std::to_string(handle) + " is not loaded");
  return *found->second;
}

void Machine::unload(int handle) {
  for (const auto& [name, address] : module(handle).globals) memory.free(address);
  modules_.erase(handle);
}

Program& Machine::kernel(int handle, const std::string& name) const {
  LoadedModule& loaded = module(handle);
  std::unique_ptr<Program>& program = loaded.programs[name];
  if (!program) {
    const ptx::Kernel* kernel = loaded.parsed.find(name);
    if (kernel == nullptr || !kernel->is_entry) {
      loaded.programs.erase(name);
      std::string all;
      for (const std::string& other : kernels(handle)) all += (all.empty() ? "" : ", ") + other;
      throw ArgumentError("no kernel `" + name +
                          "` in the module; it has: " + (all.empty() ? "none" : all));
    }
    program = build_program(loaded.parsed, *kernel, loaded.globals);
  }
  return *program;
}

std::vector<std::string> Machine::kernels(int handle) const {
  std::vector<std::string> names;
  for (const ptx::Kernel& kernel : module(handle).parsed.kernels) {
    if (kernel.is_entry) names.push_back(kernel.name);
  }
  return names;
}

bool Machine::variable(int handle, const std::string& name, uint64_t* address,
                       uint64_t* bytes) const {
  const LoadedModule& loaded = module(handle);
  const auto found = loaded.globals.find(name);
  if (found == loaded.globals.end()) return false;
  *address = found->second;
  *bytes = loaded.sizes.at(name);
  return true;
}

LaunchRecord& Machine::launch(const Program& kernel, const LaunchShape& shape,
                              const void* parameters, size_t bytes) {
  if (bytes != kernel.parameter_bytes) {
    throw ArgumentError("kernel `" + kernel.name + "` takes " +
                        std::to_string(kernel.parameter_bytes) + " bytes of parameters, not " +
                        std::to_string(bytes));
  }
  for (int i = 0; i < 3; ++i) {
    if (shape.grid[i] == 0 || shape.block[i] == 0)
      throw ArgumentError("a grid or block with no threads");
    if (shape.cluster[i] != 1) throw ArgumentError("only clusters of one block are modelled");
  }
  if (uint64_t{shape.grid[0]} * shape.grid[1] * shape.grid[2] >= uint64_t{1} << 20) {
    throw ArgumentError("more than 2^20 blocks are not modelled");
  }
  if (uint64_t{shape.block[0]} * shape.block[1] * shape.block[2] > 1024) {
    throw ArgumentError("more than 1024 threads in a block");
  }
  launches.emplace_back(std::make_unique<LaunchRecord>());
  LaunchRecord& record = *launches.back();
  Launch launch(*this, kernel, shape, parameters, &record);
  try {
    launch.run();
    record.completed = true;
  } catch (const LaunchEnd&) {
    // Among the findings.
  }
  return record;
}

}  // namespace emulator
