// A PTX module as the parser leaves it: names resolved to nothing yet, every instruction with its
// line.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulator::ptx {

enum class Space { Register, Parameter, Constant, Global, Shared, Local, Generic };

// A fundamental type (PTX ISA 5.2): its letter class and its width. Packed types hold two or more
// elements.
struct Type {
  enum class Class { Bits, Unsigned, Signed, Float, BFloat, TFloat, Predicate, Other };
  Class cls = Class::Bits;
  int bits = 0;   // of one element
  int count = 1;  // elements: 2 in f16x2

  int bytes() const { return bits * count / 8; }
  bool is_signed() const { return cls == Class::Signed; }
  bool is_float() const {
    return cls == Class::Float || cls == Class::BFloat || cls == Class::TFloat;
  }
  bool operator==(const Type& o) const {
    return cls == o.cls && bits == o.bits && count == o.count;
  }
  bool operator!=(const Type& o) const { return !(*this == o); }
};

// Reads "u32", "f16x2", "pred" ...; false where the text names no type.
bool parse_type(const std::string& text, Type* type);
std::string to_string(const Type& type);

struct Operand {
  enum class Kind {
    Register,   // name
    Immediate,  // value, is_float for 0f / 0d literals and decimals with a point
    Symbol,     // name (+ offset): the address of a variable, a label, or a function
    Address,    // [base + offset], base a register or a symbol; [immediate] has an empty name
    Vector,     // {a, b, ...}: elements
    Sink,       // _
  };
  Kind kind = Kind::Sink;
  std::string name;
  bool negated = false;   // !%p
  uint64_t value = 0;     // Immediate: two's complement, or the literal's bits
  bool is_float = false;  // Immediate: `value` holds the bits of a double
  int64_t offset = 0;     // Address, Symbol
  std::vector<Operand>
      elements;  // Vector; for Address of a tensor copy: the coordinates that follow
  // d|p: the second destination of shfl, setp and others.
  std::vector<Operand> second;
};

// Where an instruction came from.
struct Position {
  int ptx_line = 0;   // 1-based
  int file = 0;       // index of .file; 0: unknown
  int cuda_line = 0;  // 0: unknown
};

struct Instruction {
  std::string text;                    // as written, without the semicolon
  std::string root;                    // "cp"
  std::vector<std::string> modifiers;  // "async", "cg", "shared", "global", "L2::128B"
  std::vector<Operand> operands;
  std::string guard;  // predicate register; empty: always
  bool guard_negated = false;
  Position at;

  bool has(const std::string& modifier) const;
};

struct Register {
  std::string name;
  Type type;
};

// A variable of any space but the registers; also a kernel's parameter.
struct Variable {
  std::string name;
  Space space = Space::Global;
  uint64_t alignment = 1;
  uint64_t bytes = 0;  // 0 for an `extern .shared x[]`
  bool is_extern = false;
  std::vector<uint8_t> initial;  // empty: none (global memory starts as zeros)
  int line = 0;
};

struct Kernel {
  std::string name;
  bool is_entry = true;
  std::vector<Variable> parameters;
  std::vector<Register> registers;
  std::vector<Variable> variables;  // .shared and .local of the body
  std::vector<Instruction> instructions;
  std::map<std::string, int> labels;                               // to an index in `instructions`
  std::map<std::string, std::vector<std::string>> branch_targets;  // of brx.idx
  std::array<int, 3> max_threads{0, 0, 0};                         // .maxntid; zeros: not given
  std::array<int, 3> required_threads{0, 0, 0};                    // .reqntid
  int line = 0;
};

struct Module {
  std::string version;
  std::string target;
  std::map<int, std::string> files;
  std::vector<Variable> variables;  // of the module: .global, .const, .shared
  std::vector<Kernel> kernels;

  const Kernel* find(const std::string& name) const;
};

// Throws ParseError with the line.
Module parse(const std::string& text);

}  // namespace emulator::ptx
