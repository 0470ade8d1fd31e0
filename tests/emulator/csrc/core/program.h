// A kernel made ready to run: its steps, the layout of a warp's frame, and where its variables lie.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/step.h"
#include "memory/shared_memory.h"
#include "ptx/program.h"

namespace emulator {

struct Parameter {
  std::string name;
  uint32_t offset = 0;
  uint32_t bytes = 0;
};

class Program {
 public:
  std::string name;
  std::vector<Step> steps;
  std::vector<std::string> opcodes;  // of Step::opcode: root and modifiers
  std::map<int, std::string> files;  // of Position::file

  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t static_shared_bytes = 0;
  uint32_t dynamic_shared_offset =
      0;                     // from the first variable: static memory, rounded to the alignment
  uint32_t local_bytes = 0;  // of a thread
  std::array<int, 3> max_threads{0, 0, 0};
  std::array<int, 3> required_threads{0, 0, 0};
  int registers = 0;  // a thread's, by the compiler's report; 0: unknown

  uint32_t frame_bytes = 0;
  uint32_t slots = 0;
  struct Constant {
    Slot slot;
    uint64_t bits;
  };
  std::vector<Constant> constants;
  struct Special {
    Slot slot;
    std::string name;  // "%tid.x"
  };
  std::vector<Special> specials;
  std::vector<SharedMemory::Variable> shared_variables;
  std::string dynamic_shared_name;
};

}  // namespace emulator
