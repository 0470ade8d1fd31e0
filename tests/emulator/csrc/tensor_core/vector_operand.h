// Vector operands of 32-bit registers: {%r1, %r2, ...}.
#pragma once

#include <string>

#include "core/binder.h"

namespace emulator {

enum class Direction { Source, Destination };

// Appends the registers of a vector operand to the step's slots.
inline void bind_registers(Binder& binder, int operand, int expected, Direction direction) {
  static const ptx::Type kRegister{ptx::Type::Class::Bits, 32, 1};
  const ptx::Operand& vector = binder.operand(operand);
  if (vector.kind != ptx::Operand::Kind::Vector ||
      static_cast<int>(vector.elements.size()) != expected) {
    binder.unsupported("operand " + std::to_string(operand) + ", which must be a vector of " +
                       std::to_string(expected) + " registers");
  }
  for (const ptx::Operand& element : vector.elements) {
    binder.step.slots.push_back(direction == Direction::Source
                                    ? binder.source(element, kRegister)
                                    : binder.destination(element, kRegister));
  }
}

}  // namespace emulator
