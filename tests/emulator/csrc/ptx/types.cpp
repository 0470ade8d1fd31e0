#include <map>

#include "ptx/program.h"

namespace emulator::ptx {

bool parse_type(const std::string& text, Type* type) {
  using Class = Type::Class;
  static const std::map<std::string, Type> kTypes = {
      {"b8", {Class::Bits, 8, 1}},       {"b16", {Class::Bits, 16, 1}},
      {"b32", {Class::Bits, 32, 1}},     {"b64", {Class::Bits, 64, 1}},
      {"b128", {Class::Bits, 128, 1}},   {"u8", {Class::Unsigned, 8, 1}},
      {"u16", {Class::Unsigned, 16, 1}}, {"u32", {Class::Unsigned, 32, 1}},
      {"u64", {Class::Unsigned, 64, 1}}, {"s8", {Class::Signed, 8, 1}},
      {"s16", {Class::Signed, 16, 1}},   {"s32", {Class::Signed, 32, 1}},
      {"s64", {Class::Signed, 64, 1}},   {"f16", {Class::Float, 16, 1}},
      {"f16x2", {Class::Float, 16, 2}},  {"f32", {Class::Float, 32, 1}},
      {"f32x2", {Class::Float, 32, 2}},  {"f64", {Class::Float, 64, 1}},
      {"bf16", {Class::BFloat, 16, 1}},  {"bf16x2", {Class::BFloat, 16, 2}},
      {"tf32", {Class::TFloat, 32, 1}},  {"u16x2", {Class::Unsigned, 16, 2}},
      {"s16x2", {Class::Signed, 16, 2}}, {"pred", {Class::Predicate, 0, 1}},
  };
  const auto found = kTypes.find(text);
  if (found == kTypes.end()) return false;
  *type = found->second;
  return true;
}

std::string to_string(const Type& type) {
  static const char* const kLetters[] = {"b", "u", "s", "f", "bf", "tf", "pred", "?"};
  if (type.cls == Type::Class::Predicate) return "pred";
  std::string text = kLetters[static_cast<int>(type.cls)] + std::to_string(type.bits);
  if (type.count > 1) text += "x" + std::to_string(type.count);
  return text;
}

bool Instruction::has(const std::string& modifier) const {
  for (const std::string& m : modifiers) {
    if (m == modifier) return true;
  }
  return false;
}

const Kernel* Module::find(const std::string& name) const {
  for (const Kernel& kernel : kernels) {
    if (kernel.name == name) return &kernel;
  }
  return nullptr;
}

}  // namespace emulator::ptx
