// Turns one parsed instruction into a Step. An opcode's binder reads the modifiers, picks the
// handler's instantiation and places the operands; what it does not know it refuses by
// `unsupported`.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "core/step.h"
#include "ptx/program.h"

namespace emulator {

class FrameLayout;

class Binder {
 public:
  Binder(const ptx::Instruction& instruction, FrameLayout& layout, Step* step);

  const ptx::Instruction& instruction;
  Step& step;

  // Modifiers in order, one after another: `next()` looks, `take("sat")` consumes it when it is
  // next, `take_type` consumes a type. `done()` refuses whatever is left over.
  const std::string& next() const;
  bool take(const std::string& modifier);
  bool take_type(ptx::Type* type);
  ptx::Type type();  // take_type, or refuse
  void done();

  // The operand as a source of `width` bytes a lane (0: a predicate, which must not be negated).
  // An immediate becomes a constant slot; a float literal is converted to the type when `is_float`.
  // `any_width`: a register may be wider or narrower than `width` (ld, st, cvt); the slot tells.
  Slot source(const ptx::Operand& operand, const ptx::Type& type, bool any_width = false);
  Slot source(int operand, const ptx::Type& type, bool any_width = false);
  // As above for a register that is written; `_` gives an invalid slot.
  Slot destination(const ptx::Operand& operand, const ptx::Type& type, bool any_width = false);
  Slot destination(int operand, const ptx::Type& type, bool any_width = false);
  Slot predicate(const ptx::Operand& operand, bool* negated);
  // A predicate register of the machine's own, such as the carry flag "%cc".
  Slot predicate_register(const std::string& name);
  // The step that a label names, or refuse.
  int label(int operand) const;
  // A constant of `width` bytes in every lane.
  Slot constant(uint64_t bits, int width);
  // [base + offset]: the base as a source slot (8 or 4 bytes wide), or a constant slot for a
  // symbol. The byte offset is returned apart.
  Slot address(const ptx::Operand& operand, int64_t* offset);
  Slot address(int operand, int64_t* offset) { return address(this->operand(operand), offset); }

  const ptx::Operand& operand(int i) const;  // refuses a missing one
  int operand_count() const { return static_cast<int>(instruction.operands.size()); }
  // Bytes of a register's value; 0: a predicate; -1: not a register.
  int width_of(const ptx::Operand& operand) const;
  bool is_immediate(int operand) const;
  int64_t immediate(int operand) const;  // an integer literal, or refuse

  [[noreturn]] void unsupported(const std::string& what) const;

 private:
  FrameLayout& layout_;
  size_t next_ = 0;
};

using Bind = void (*)(Binder&);

// Opcode roots ("add", "cp") to their binders. Where a root has families told apart by the first
// modifier ("cp.async", "mbarrier.init"), the binder of the root looks.
class Opcodes {
 public:
  static const Opcodes& all();
  void add(const std::string& root, Bind bind);
  Bind find(const std::string& root) const;  // nullptr: unknown

 private:
  std::map<std::string, Bind> binders_;
};

// One for each file of instructions; Opcodes::all() calls every one.
void add_integer(Opcodes&);
void add_bits(Opcodes&);
void add_logic(Opcodes&);
void add_floating(Opcodes&);
void add_convert(Opcodes&);
void add_compare(Opcodes&);
void add_move(Opcodes&);
void add_control(Opcodes&);
void add_warp(Opcodes&);
void add_memory(Opcodes&);
void add_atomic(Opcodes&);
void add_barrier(Opcodes&);
void add_matrix(Opcodes&);  // ldmatrix, stmatrix, movmatrix, mma
void add_wgmma(Opcodes&);
void add_asynchronous(Opcodes&);  // cp.async, cp.async.bulk, mbarrier

}  // namespace emulator
