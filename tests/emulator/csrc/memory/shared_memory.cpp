#include "memory/shared_memory.h"

#include <cstring>

#include "core/block.h"
#include "runtime/machine.h"

namespace emulator {

SharedMemory::SharedMemory(uint32_t bytes, std::vector<Variable> variables)
    : races(kSharedBase, bytes),
      bytes_(bytes),
      undefined_(bytes, 0xff),
      variables_(std::move(variables)) {}

std::string SharedMemory::describe(uint32_t address) const {
  const Variable* best = nullptr;
  for (const Variable& v : variables_) {
    if (v.address <= address) best = &v;
  }
  if (best == nullptr) return "shared memory address " + std::to_string(address);
  return "shared memory `" + best->name + "` + " + std::to_string(address - best->address);
}

bool SharedMemory::refuse(Warp& warp, const Step& step, int lane, uint32_t address, int bytes,
                          const char* verb) {
  const std::string what =
      std::string(verb) + " " + std::to_string(bytes) + " bytes at " + describe(address);
  if (address % static_cast<uint32_t>(bytes) != 0) {
    warp.report(Check::Misaligned, step, lane,
                what + ", which is not a multiple of " + std::to_string(bytes));
  } else {
    warp.report(Check::OutOfBounds, step, lane,
                what + ", outside the block's " + std::to_string(size()) + " bytes (from address " +
                    std::to_string(kSharedBase) + ")");
  }
  return false;
}

bool SharedMemory::load(Warp& warp, const Step& step, int lane, uint32_t address, int bytes,
                        void* value, uint8_t* undefined, bool async_proxy) {
  if (address % static_cast<uint32_t>(bytes) != 0 ||
      !inside(address, static_cast<uint64_t>(bytes))) {
    std::memset(value, 0, static_cast<size_t>(bytes));
    std::memset(undefined, 0, static_cast<size_t>(bytes));
    return refuse(warp, step, lane, address, bytes, "reads");
  }
  if (warp.block().settings().check_races) {
    SharedRaces::Access access{&warp, &step, lane, address, static_cast<uint32_t>(bytes), false};
    access.async_proxy = async_proxy;
    races.access(access);
  }
  std::memcpy(value, data(address), static_cast<size_t>(bytes));
  std::memcpy(undefined, this->undefined(address), static_cast<size_t>(bytes));
  return true;
}

bool SharedMemory::store(Warp& warp, const Step& step, int lane, uint32_t address, int bytes,
                         const void* value, const uint8_t* undefined) {
  if (address % static_cast<uint32_t>(bytes) != 0 ||
      !inside(address, static_cast<uint64_t>(bytes))) {
    return refuse(warp, step, lane, address, bytes, "writes");
  }
  const bool same = std::memcmp(data(address), value, static_cast<size_t>(bytes)) == 0;
  if (warp.block().settings().check_races) {
    SharedRaces::Access access{&warp, &step, lane, address, static_cast<uint32_t>(bytes), true};
    access.same_value = same;
    races.access(access);
  }
  if (!same) warp.block().changed();
  std::memcpy(data(address), value, static_cast<size_t>(bytes));
  std::memcpy(this->undefined(address), undefined, static_cast<size_t>(bytes));
  return true;
}

}  // namespace emulator
