#include "instructions/memory_operand.h"

#include <set>
#include <string>

#include "core/address_space.h"
#include "core/block.h"

namespace emulator {

void MemoryOperand::take_modifiers(Binder& b) {
  static const std::set<std::string> kHints = {"ca",
                                               "cg",
                                               "cs",
                                               "lu",
                                               "cv",
                                               "wb",
                                               "wt",
                                               "nc",
                                               "weak",
                                               "unified",
                                               "noinc",
                                               "mmio",
                                               "L2::cache_hint"};
  while (true) {
    const std::string modifier = b.next();
    if (modifier == "global" || modifier == "const") {
      space = modifier == "global" ? ptx::Space::Global : ptx::Space::Constant;
    } else if (modifier == "shared" || modifier == "shared::cta" || modifier == "shared::cluster") {
      space = ptx::Space::Shared;
    } else if (modifier == "local") {
      space = ptx::Space::Local;
    } else if (modifier == "param" || modifier == "param::entry" || modifier == "param::func") {
      space = ptx::Space::Parameter;
    } else if (modifier == "volatile" || modifier == "relaxed") {
      ordering.strong = true;
    } else if (modifier == "acquire") {
      ordering.strong = ordering.acquire = true;
    } else if (modifier == "release") {
      ordering.strong = ordering.release = true;
    } else if (modifier == "acq_rel") {
      ordering.strong = ordering.acquire = ordering.release = true;
    } else if (modifier == "cta") {
      ordering.block_scope = true;
    } else if (modifier == "gpu" || modifier == "sys" || modifier == "cluster") {
      ordering.block_scope = false;
    } else if (kHints.count(modifier) == 0 && modifier.rfind("L1::", 0) != 0 &&
               modifier.rfind("L2::", 0) != 0) {
      return;
    }
    b.take(modifier);
  }
}

Slot MemoryOperand::take_address(Binder& b, int operand) {
  return b.address(operand, &offset);
}

Request::Request(Warp& warp, const Step& step, LaneMask active, const MemoryOperand& operand,
                 int bytes) {
  const Slot& base = step.slots[0];
  warp.require_defined(step, base, active, "is used as an address");
  LaneMask global = 0, shared = 0;
  uint32_t shared_addresses[kLanes] = {};
  for_each_lane(active, [&](int l) {
    uint64_t address = warp.value(base, l) + static_cast<uint64_t>(operand.offset);
    ptx::Space space = operand.space;
    if (space == ptx::Space::Generic) {
      space = resolve_generic(address, &address);
    } else if (space == ptx::Space::Parameter && in_window(address, kParameterWindow)) {
      address -= kParameterWindow;
    } else if (space == ptx::Space::Shared || space == ptx::Space::Local) {
      address &= 0xffff'ffff;
    }
    addresses_[l] = address;
    spaces_[l] = space;
    if (space == ptx::Space::Global) global |= lane_bit(l);
    if (space == ptx::Space::Shared) {
      shared |= lane_bit(l);
      shared_addresses[l] = static_cast<uint32_t>(address);
    }
  });
  if (global != 0) warp.block().counters().global_request(step, addresses_, global, bytes);
  if (shared != 0) warp.block().counters().shared_request(step, shared_addresses, shared, bytes);
}

}  // namespace emulator
