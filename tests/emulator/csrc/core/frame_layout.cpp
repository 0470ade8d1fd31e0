#include "core/frame_layout.h"

#include "common/error.h"

namespace emulator {

FrameLayout::FrameLayout(const ptx::Kernel& kernel, Program* program)
    : kernel_(kernel), program_(program) {
  for (const ptx::Register& r : kernel.registers) {
    registers_[r.name] = add(r.type.bytes());
    types_[r.name] = r.type;
  }
}

// A predicate takes one 32-bit mask for the whole warp, any other register a value for each lane.
// Every slot begins at a multiple of 64 bytes, a vector register of the host.
Slot FrameLayout::add(int width) {
  Slot slot;
  slot.offset = next_;
  slot.index = slots_++;
  slot.width = static_cast<uint8_t>(width);
  slot.valid = true;
  next_ += (static_cast<uint32_t>(width == 0 ? 4 : width * kLanes) + 63) / 64 * 64;
  return slot;
}

Slot FrameLayout::register_slot(const std::string& name) const {
  const auto found = registers_.find(name);
  return found == registers_.end() ? Slot{} : found->second;
}

ptx::Type FrameLayout::register_type(const std::string& name) const {
  const auto found = types_.find(name);
  return found == types_.end() ? ptx::Type{} : found->second;
}

Slot FrameLayout::special(const std::string& name, int width) {
  const auto [at, fresh] = specials_.try_emplace({name, width});
  if (fresh) {
    at->second = add(width);
    program_->specials.push_back({at->second, name});
  }
  return at->second;
}

Slot FrameLayout::hidden_predicate(const std::string& name) {
  const auto [at, fresh] = registers_.try_emplace(name);
  if (fresh) at->second = add(0);
  return at->second;
}

Slot FrameLayout::constant(uint64_t bits, int width) {
  if (width < 8) bits &= (uint64_t{1} << (8 * width)) - 1;
  const auto [at, fresh] = constants_.try_emplace({bits, width});
  if (fresh) {
    at->second = add(width);
    program_->constants.push_back({at->second, bits});
  }
  return at->second;
}

const FrameLayout::Symbol* FrameLayout::symbol(const std::string& name) const {
  const auto found = symbols_.find(name);
  return found == symbols_.end() ? nullptr : &found->second;
}

int FrameLayout::label(const std::string& name) const {
  const auto found = kernel_.labels.find(name);
  return found == kernel_.labels.end() ? -1 : found->second;
}

void FrameLayout::finish() {
  program_->frame_bytes = next_;
  program_->slots = slots_;
}

}  // namespace emulator
