#include "core/binder.h"

#include <cstring>

#include "common/error.h"
#include "core/frame_layout.h"

namespace emulator {

using ptx::Operand;
using ptx::Type;

Binder::Binder(const ptx::Instruction& instruction, FrameLayout& layout, Step* step)
    : instruction(instruction), step(*step), layout_(layout) {}

const std::string& Binder::next() const {
  static const std::string kNone;
  return next_ < instruction.modifiers.size() ? instruction.modifiers[next_] : kNone;
}

bool Binder::take(const std::string& modifier) {
  if (next() != modifier) return false;
  ++next_;
  return true;
}

bool Binder::take_type(Type* type) {
  if (!ptx::parse_type(next(), type)) return false;
  ++next_;
  return true;
}

Type Binder::type() {
  Type type;
  if (!take_type(&type)) unsupported("`" + next() + "` where a type belongs");
  return type;
}

void Binder::done() {
  if (next_ != instruction.modifiers.size()) unsupported("the modifier `." + next() + "`");
}

void Binder::unsupported(const std::string& what) const {
  throw Unsupported(instruction.at.ptx_line, what + " in `" + instruction.text + "`");
}

const Operand& Binder::operand(int i) const {
  if (i < 0 || i >= operand_count()) unsupported("a missing operand");
  return instruction.operands[static_cast<size_t>(i)];
}

int Binder::width_of(const Operand& operand) const {
  const Slot slot = layout_.register_slot(operand.name);
  return operand.kind == Operand::Kind::Register && slot.valid ? slot.width : -1;
}

bool Binder::is_immediate(int i) const {
  return operand(i).kind == Operand::Kind::Immediate;
}

int64_t Binder::immediate(int i) const {
  const Operand& o = operand(i);
  if (o.kind != Operand::Kind::Immediate || o.is_float)
    unsupported("an operand that is not an integer literal");
  return static_cast<int64_t>(o.value);
}

Slot Binder::constant(uint64_t bits, int width) {
  return layout_.constant(bits, width);
}

namespace {

// A literal's bits in the type that the instruction reads it as.
uint64_t literal_bits(const Operand& operand, const Type& type) {
  if (!operand.is_float) return operand.value;
  double value;
  std::memcpy(&value, &operand.value, sizeof value);
  if (type.bits == 64) return operand.value;
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return bits;
}

}  // namespace

Slot Binder::source(const Operand& operand, const Type& type, bool any_width) {
  const int width = type.bytes();
  switch (operand.kind) {
    case Operand::Kind::Register: {
      if (operand.negated && type.cls != Type::Class::Predicate) unsupported("a negated operand");
      const Slot slot = layout_.register_slot(operand.name);
      if (slot.valid) {
        if (!any_width && slot.width != width) {
          unsupported("`" + operand.name + "` of " + std::to_string(8 * slot.width) +
                      " bits as a " + ptx::to_string(type));
        }
        return slot;
      }
      if (operand.name == "WARP_SZ") return constant(kLanes, width);
      return layout_.special(operand.name, width);
    }
    case Operand::Kind::Immediate:
      return constant(literal_bits(operand, type), width);
    case Operand::Kind::Symbol: {
      const FrameLayout::Symbol* symbol = layout_.symbol(operand.name);
      if (symbol == nullptr) unsupported("the unknown name `" + operand.name + "`");
      return constant(symbol->address + static_cast<uint64_t>(operand.offset), width);
    }
    default:
      unsupported("an operand of a kind that does not belong there");
  }
}

Slot Binder::source(int i, const Type& type, bool any_width) {
  return source(operand(i), type, any_width);
}

Slot Binder::destination(const Operand& operand, const Type& type, bool any_width) {
  if (operand.kind == Operand::Kind::Sink) {
    Slot slot;
    slot.width = static_cast<uint8_t>(type.bytes());
    return slot;
  }
  if (operand.kind != Operand::Kind::Register) unsupported("a destination that is not a register");
  const Slot slot = layout_.register_slot(operand.name);
  if (!slot.valid) unsupported("the unknown register `" + operand.name + "`");
  if (!any_width && slot.width != type.bytes()) {
    unsupported("`" + operand.name + "` of " + std::to_string(8 * slot.width) + " bits as a " +
                ptx::to_string(type));
  }
  return slot;
}

Slot Binder::destination(int i, const Type& type, bool any_width) {
  return destination(operand(i), type, any_width);
}

Slot Binder::predicate(const Operand& operand, bool* negated) {
  *negated = operand.negated;
  if (operand.kind != Operand::Kind::Register)
    unsupported("an operand that is not a predicate register");
  const Slot slot = layout_.register_slot(operand.name);
  if (!slot.valid || slot.width != 0)
    unsupported("`" + operand.name + "`, which is not a predicate");
  return slot;
}

Slot Binder::predicate_register(const std::string& name) {
  return layout_.hidden_predicate(name);
}

Slot Binder::address(const Operand& operand, int64_t* offset) {
  if (operand.kind != Operand::Kind::Address) unsupported("an operand that is not an address");
  *offset = operand.offset;
  if (operand.name.empty()) return constant(0, 8);
  if (operand.negated) {  // the parser's mark of a base register
    const Slot slot = layout_.register_slot(operand.name);
    if (!slot.valid || (slot.width != 8 && slot.width != 4))
      unsupported("the address register `" + operand.name + "`");
    return slot;
  }
  const FrameLayout::Symbol* symbol = layout_.symbol(operand.name);
  if (symbol == nullptr) unsupported("the unknown name `" + operand.name + "`");
  return constant(symbol->address, 8);
}

int Binder::label(int i) const {
  const Operand& o = operand(i);
  const int at = o.kind == Operand::Kind::Symbol ? layout_.label(o.name) : -1;
  if (at < 0) unsupported("a branch to nowhere");
  return at;
}

const Opcodes& Opcodes::all() {
  static const Opcodes kAll = [] {
    Opcodes opcodes;
    add_integer(opcodes);
    add_bits(opcodes);
    add_logic(opcodes);
    add_floating(opcodes);
    add_convert(opcodes);
    add_compare(opcodes);
    add_move(opcodes);
    add_control(opcodes);
    add_warp(opcodes);
    add_memory(opcodes);
    add_atomic(opcodes);
    add_barrier(opcodes);
    add_matrix(opcodes);
    add_wgmma(opcodes);
    add_asynchronous(opcodes);
    return opcodes;
  }();
  return kAll;
}

void Opcodes::add(const std::string& root, Bind bind) {
  if (!binders_.emplace(root, bind).second) throw Error("two binders for `" + root + "`");
}

Bind Opcodes::find(const std::string& root) const {
  const auto found = binders_.find(root);
  return found == binders_.end() ? nullptr : found->second;
}

}  // namespace emulator
