// Lays out a warp's frame: where each register, constant and special register lies, and what each
// symbol's address is.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <utility>

#include "core/program.h"
#include "core/step.h"
#include "ptx/program.h"

namespace emulator {

class FrameLayout {
 public:
  FrameLayout(const ptx::Kernel& kernel, Program* program);

  // Invalid where no such register was declared; special registers come to be as they are asked
  // for.
  Slot register_slot(const std::string& name) const;
  Slot special(const std::string& name, int width);
  Slot hidden_predicate(const std::string& name);  // "%cc"
  Slot constant(uint64_t bits, int width);
  ptx::Type register_type(const std::string& name) const;

  struct Symbol {
    ptx::Space space;
    uint64_t address;  // in its space
  };
  void define(const std::string& name, Symbol symbol) { symbols_[name] = symbol; }
  const Symbol* symbol(const std::string& name) const;

  // Index in the steps of a label; -1: none.
  int label(const std::string& name) const;
  // Makes the frame's size and tables final.
  void finish();

 private:
  Slot add(int width);

  const ptx::Kernel& kernel_;
  Program* program_;
  std::unordered_map<std::string, Slot> registers_;
  std::unordered_map<std::string, ptx::Type> types_;
  std::map<std::pair<uint64_t, int>, Slot> constants_;
  std::map<std::pair<std::string, int>, Slot> specials_;
  std::unordered_map<std::string, Symbol> symbols_;
  uint32_t next_ = 0;
  uint32_t slots_ = 0;
};

}  // namespace emulator
