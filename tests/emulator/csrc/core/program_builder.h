// Makes a parsed kernel ready to run.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "core/program.h"
#include "ptx/program.h"

namespace emulator {

// `globals`: the addresses of the module's .global and .const variables.
// Throws Unsupported with the line of what is not modelled.
std::unique_ptr<Program> build_program(const ptx::Module& module, const ptx::Kernel& kernel,
                                       const std::map<std::string, uint64_t>& globals);

}  // namespace emulator
