// ld and st in every state space (PTX ISA 9.7.9, "Data Movement and Conversion Instructions").
#include <cstring>

#include "core/address_space.h"
#include "core/binder.h"
#include "core/block.h"
#include "core/launch.h"
#include "core/warp.h"
#include "instructions/memory_operand.h"
#include "memory/global_access.h"

namespace emulator {

namespace {

constexpr int kMaxBytes = 32;

struct Transfer : Detail {
  MemoryOperand memory;
  ptx::Type type;
  int elements = 1;
  int bytes() const { return type.bytes() * elements; }
};

bool load_parameter(Warp& warp, const Step& step, int lane, uint64_t address, int bytes,
                    uint8_t* value, uint8_t* undefined) {
  std::memset(undefined, 0, static_cast<size_t>(bytes));
  const std::vector<uint8_t>& parameters = warp.block().launch().parameters;
  if (address + static_cast<uint64_t>(bytes) > parameters.size()) {
    std::memset(value, 0, static_cast<size_t>(bytes));
    warp.report(Check::OutOfBounds, step, lane,
                "reads " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
                    " of the " + std::to_string(parameters.size()) + " bytes of parameters");
    return false;
  }
  std::memcpy(value, parameters.data() + address, static_cast<size_t>(bytes));
  return true;
}

bool local_in_bounds(Warp& warp, const Step& step, int lane, uint64_t address, int bytes) {
  if (address % static_cast<uint64_t>(bytes) != 0) {
    warp.report(Check::Misaligned, step, lane,
                "accesses local memory at " + std::to_string(address) +
                    ", which is not a multiple of " + std::to_string(bytes));
    return false;
  }
  if (address + static_cast<uint64_t>(bytes) > warp.block().program().local_bytes || address < 16) {
    warp.report(Check::OutOfBounds, step, lane,
                "accesses local memory at " + std::to_string(address) + ", outside the thread's " +
                    std::to_string(warp.block().program().local_bytes) + " bytes");
    return false;
  }
  return true;
}

void load_lane(Warp& warp, const Step& step, int lane, ptx::Space space, uint64_t address,
               const Transfer& t, uint8_t* value, uint8_t* undefined) {
  const int bytes = t.bytes();
  switch (space) {
    case ptx::Space::Shared:
      warp.block().shared().load(warp, step, lane, static_cast<uint32_t>(address), bytes, value,
                                 undefined);
      return;
    case ptx::Space::Parameter:
      load_parameter(warp, step, lane, address, bytes, value, undefined);
      return;
    case ptx::Space::Local:
      std::memset(value, 0, static_cast<size_t>(bytes));
      std::memset(undefined, 0, static_cast<size_t>(bytes));
      if (!local_in_bounds(warp, step, lane, address, bytes)) return;
      std::memcpy(value, warp.block().local(warp.thread(lane)) + address,
                  static_cast<size_t>(bytes));
      std::memcpy(undefined, warp.block().local_undefined(warp.thread(lane)) + address,
                  static_cast<size_t>(bytes));
      return;
    default:
      load_global(warp, step, lane, address, bytes, t.memory.ordering, value, undefined);
  }
}

void store_lane(Warp& warp, const Step& step, int lane, ptx::Space space, uint64_t address,
                const Transfer& t, const uint8_t* value, const uint8_t* undefined) {
  const int bytes = t.bytes();
  switch (space) {
    case ptx::Space::Shared:
      warp.block().shared().store(warp, step, lane, static_cast<uint32_t>(address), bytes, value,
                                  undefined);
      return;
    case ptx::Space::Parameter:
      return;  // an argument of a call, and the only calls that are modelled end the run
    case ptx::Space::Local:
      if (!local_in_bounds(warp, step, lane, address, bytes)) return;
      std::memcpy(warp.block().local(warp.thread(lane)) + address, value,
                  static_cast<size_t>(bytes));
      std::memcpy(warp.block().local_undefined(warp.thread(lane)) + address, undefined,
                  static_cast<size_t>(bytes));
      return;
    default:
      store_global(warp, step, lane, address, bytes, t.memory.ordering, value, undefined);
  }
}

// step.slots: the address, then the registers.
void run_ld(Warp& warp, const Step& step, LaneMask active) {
  const auto& t = static_cast<const Transfer&>(*step.detail);
  Request request(warp, step, active, t.memory, t.bytes());
  const int size = t.type.bytes();
  bool changed = false;
  for_each_lane(active, [&](int l) {
    uint8_t value[kMaxBytes], undefined[kMaxBytes];
    load_lane(warp, step, l, request.space(l), request.address(l), t, value, undefined);
    for (int e = 0; e < t.elements; ++e) {
      const Slot& d = step.slots[static_cast<size_t>(e) + 1];
      if (!d.valid) continue;
      uint64_t bits = 0, unknown = 0;
      std::memcpy(&bits, value + e * size, static_cast<size_t>(size));
      std::memcpy(&unknown, undefined + e * size, static_cast<size_t>(size));
      if (t.type.is_signed() && d.width > size) {
        const int shift = 64 - 8 * size;
        bits = static_cast<uint64_t>(static_cast<int64_t>(bits << shift) >> shift);
        unknown = static_cast<uint64_t>(static_cast<int64_t>(unknown << shift) >> shift);
      }
      changed = changed || warp.value(d, l) != bits;
      warp.store_lane(d, l, bits);
      if (unknown != 0) warp.set_undefined(d, l, unknown);
    }
  });
  if (t.memory.ordering.strong) warp.polled(step, changed);
}

void run_st(Warp& warp, const Step& step, LaneMask active) {
  const auto& t = static_cast<const Transfer&>(*step.detail);
  Request request(warp, step, active, t.memory, t.bytes());
  const int size = t.type.bytes();
  for_each_lane(active, [&](int l) {
    uint8_t value[kMaxBytes], undefined[kMaxBytes];
    for (int e = 0; e < t.elements; ++e) {
      const Slot& s = step.slots[static_cast<size_t>(e) + 1];
      const uint64_t bits = warp.value(s, l);
      const auto unknown = warp.undefined_of<uint64_t>(s, l);
      std::memcpy(value + e * size, &bits, static_cast<size_t>(size));
      // Memory knows bytes, registers know bits: a byte with an undefined bit is undefined.
      for (int i = 0; i < size; ++i)
        undefined[e * size + i] = (unknown >> (8 * i) & 0xff) != 0 ? 0xff : 0;
    }
    store_lane(warp, step, l, request.space(l), request.address(l), t, value, undefined);
  });
}

void bind_transfer(Binder& b, bool load) {
  auto t = std::make_shared<Transfer>();
  t->memory.take_modifiers(b);
  for (const int n : {2, 4, 8}) {
    if (b.take("v" + std::to_string(n))) t->elements = n;
  }
  t->type = b.type();
  b.done();
  if (t->bytes() > kMaxBytes) b.unsupported("a vector of more than 32 bytes");
  const int address = load ? 1 : 0, registers = load ? 0 : 1;
  b.step.slots.push_back(t->memory.take_address(b, address));
  const ptx::Operand& operand = b.operand(registers);
  const auto place = [&](const ptx::Operand& o) {
    const Slot slot = load ? b.destination(o, t->type, true) : b.source(o, t->type, true);
    if (slot.valid && slot.width < t->type.bytes())
      b.unsupported("a register narrower than the type");
    b.step.slots.push_back(slot);
  };
  if (t->elements == 1) {
    // Triton writes the register in braces all the same.
    const bool braces = operand.kind == ptx::Operand::Kind::Vector && operand.elements.size() == 1;
    place(braces ? operand.elements[0] : operand);
  } else {
    if (operand.kind != ptx::Operand::Kind::Vector ||
        static_cast<int>(operand.elements.size()) != t->elements) {
      b.unsupported("a vector of another length");
    }
    for (const ptx::Operand& element : operand.elements) place(element);
  }
  if (!load && (t->memory.space == ptx::Space::Constant))
    b.unsupported("a store to constant memory");
  b.step.detail = t;
  b.step.run = load ? run_ld : run_st;
}

void bind_ld(Binder& b) {
  bind_transfer(b, true);
}
void bind_st(Binder& b) {
  bind_transfer(b, false);
}

// Hints, which change no value.
void run_nothing(Warp&, const Step&, LaneMask) {}
void bind_hint(Binder& b) {
  b.step.run = run_nothing;
}

}  // namespace

void add_memory(Opcodes& opcodes) {
  opcodes.add("ld", bind_ld);
  opcodes.add("ldu", bind_ld);
  opcodes.add("st", bind_st);
  opcodes.add("prefetch", bind_hint);
  opcodes.add("prefetchu", bind_hint);
  opcodes.add("applypriority", bind_hint);
  opcodes.add("discard", bind_hint);
}

}  // namespace emulator
