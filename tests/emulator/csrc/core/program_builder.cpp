#include "core/program_builder.h"

#include <algorithm>
#include <set>
#include <unordered_map>

#include "common/error.h"
#include "core/binder.h"
#include "core/frame_layout.h"

namespace emulator {

namespace {

uint64_t round_up(uint64_t value, uint64_t alignment) {
  return alignment < 2 ? value : (value + alignment - 1) / alignment * alignment;
}

void place_parameters(const ptx::Kernel& kernel, FrameLayout* layout, Program* program) {
  uint64_t offset = 0;
  for (const ptx::Variable& v : kernel.parameters) {
    offset = round_up(offset, v.alignment);
    program->parameters.push_back(
        {v.name, static_cast<uint32_t>(offset), static_cast<uint32_t>(v.bytes)});
    layout->define(v.name, {ptx::Space::Parameter, offset});
    offset += v.bytes;
  }
  program->parameter_bytes = static_cast<uint32_t>(offset);
}

// Shared variables, the module's that the kernel names and its own, from kSharedBase on; then the
// dynamic part, which every `extern .shared x[]` names.
void place_shared(const ptx::Module& module, const ptx::Kernel& kernel, FrameLayout* layout,
                  Program* program) {
  std::set<std::string> used;
  for (const ptx::Instruction& instruction : kernel.instructions) {
    for (const ptx::Operand& operand : instruction.operands) {
      used.insert(operand.name);
      for (const ptx::Operand& element : operand.elements) used.insert(element.name);
    }
  }
  uint64_t offset = 0, dynamic_alignment = 16;
  std::vector<std::string> dynamic;
  const auto place = [&](const ptx::Variable& v) {
    if (v.bytes == 0) {
      dynamic.push_back(v.name);
      dynamic_alignment = std::max(dynamic_alignment, v.alignment);
      return;
    }
    offset = round_up(offset, v.alignment);
    const auto address = static_cast<uint32_t>(kSharedBase + offset);
    program->shared_variables.push_back({address, static_cast<uint32_t>(v.bytes), v.name});
    layout->define(v.name, {ptx::Space::Shared, address});
    offset += v.bytes;
  };
  for (const ptx::Variable& v : module.variables) {
    if (v.space == ptx::Space::Shared && used.count(v.name) != 0) place(v);
  }
  for (const ptx::Variable& v : kernel.variables) {
    if (v.space == ptx::Space::Shared) place(v);
  }
  program->static_shared_bytes = static_cast<uint32_t>(offset);
  program->dynamic_shared_offset = static_cast<uint32_t>(
      dynamic.empty() ? offset : round_up(kSharedBase + offset, dynamic_alignment) - kSharedBase);
  for (const std::string& name : dynamic) {
    layout->define(name, {ptx::Space::Shared, kSharedBase + program->dynamic_shared_offset});
    program->dynamic_shared_name = name;
  }
}

// Local variables of a thread. Address 0 stays free, so that a null pointer points at nothing.
void place_local(const ptx::Kernel& kernel, FrameLayout* layout, Program* program) {
  uint64_t offset = 16;
  for (const ptx::Variable& v : kernel.variables) {
    if (v.space == ptx::Space::Local) {
      offset = round_up(offset, v.alignment);
      layout->define(v.name, {ptx::Space::Local, offset});
      offset += v.bytes;
    } else if (v.space == ptx::Space::Parameter) {
      layout->define(v.name, {ptx::Space::Parameter, 0});  // the arguments of a call
    }
  }
  program->local_bytes = static_cast<uint32_t>(offset == 16 ? 0 : round_up(offset, 16));
}

}  // namespace

std::unique_ptr<Program> build_program(const ptx::Module& module, const ptx::Kernel& kernel,
                                       const std::map<std::string, uint64_t>& globals) {
  auto program = std::make_unique<Program>();
  program->name = kernel.name;
  program->files = module.files;
  program->max_threads = kernel.max_threads;
  program->required_threads = kernel.required_threads;
  FrameLayout layout(kernel, program.get());
  for (const auto& [name, address] : globals) layout.define(name, {ptx::Space::Global, address});
  place_parameters(kernel, &layout, program.get());
  place_shared(module, kernel, &layout, program.get());
  place_local(kernel, &layout, program.get());

  const Opcodes& opcodes = Opcodes::all();
  std::unordered_map<std::string, int> opcode_indices;
  program->steps.resize(kernel.instructions.size());
  for (size_t i = 0; i < kernel.instructions.size(); ++i) {
    const ptx::Instruction& instruction = kernel.instructions[i];
    Step& step = program->steps[i];
    step.source = &instruction;
    step.pc = static_cast<int>(i);
    std::string opcode = instruction.root;
    for (const std::string& modifier : instruction.modifiers) opcode += "." + modifier;
    const auto [at, fresh] =
        opcode_indices.try_emplace(opcode, static_cast<int>(program->opcodes.size()));
    if (fresh) program->opcodes.push_back(opcode);
    step.opcode = at->second;
    Binder binder(instruction, layout, &step);
    if (!instruction.guard.empty()) {
      ptx::Operand guard;
      guard.kind = ptx::Operand::Kind::Register;
      guard.name = instruction.guard;
      bool negated;
      step.guard = binder.predicate(guard, &negated);
      step.guard_negated = instruction.guard_negated;
    }
    const Bind bind = opcodes.find(instruction.root);
    if (bind == nullptr) binder.unsupported("the opcode `" + opcode + "`");
    bind(binder);
  }
  if (kernel.instructions.empty() ||
      !(kernel.instructions.back().root == "ret" || kernel.instructions.back().root == "exit" ||
        kernel.instructions.back().root == "bra" || kernel.instructions.back().root == "trap")) {
    throw ParseError(kernel.line, "kernel `" + kernel.name + "` can run past its end");
  }
  layout.finish();
  return program;
}

}  // namespace emulator
