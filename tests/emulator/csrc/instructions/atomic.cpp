// atom and red in global and shared memory (PTX ISA 9.7.13, "atom"). An atomic is strong: it does
// not race with other atomics, and it publishes and observes what orders blocks.
#include <algorithm>
#include <cstring>
#include <memory>

#include "arithmetic/half.h"
#include "core/address_space.h"
#include "core/binder.h"
#include "core/block.h"
#include "core/launch.h"
#include "core/warp.h"
#include "instructions/memory_operand.h"
#include "memory/global_access.h"

namespace emulator {

namespace {

using ptx::Type;

enum class Operation {
  Add,
  Min,
  Max,
  Increment,
  Decrement,
  And,
  Or,
  Xor,
  Exchange,
  CompareAndSwap
};

struct AtomicDetail : Detail {
  MemoryOperand memory;
  Type type;
  Operation operation = Operation::Add;
  bool returns = true;  // atom; red does not
  int elements = 1;     // .v2 .v4 .v8
};

template <class T>
T as(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T floating(Operation operation, T a, T b) {
  if (operation == Operation::Min) return a != a ? b : b != b ? a : std::min(a, b);
  if (operation == Operation::Max) return a != a ? b : b != b ? a : std::max(a, b);
  return a + b;
}

template <class T>
T integral(Operation operation, T a, T b) {
  using U = std::make_unsigned_t<T>;
  switch (operation) {
    case Operation::Add:
      return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
    case Operation::Min:
      return std::min(a, b);
    case Operation::Max:
      return std::max(a, b);
    case Operation::Increment:
      return static_cast<U>(a) >= static_cast<U>(b) ? T{0} : static_cast<T>(a + 1);
    case Operation::Decrement:
      return a == 0 || static_cast<U>(a) > static_cast<U>(b) ? b : static_cast<T>(a - 1);
    case Operation::And:
      return a & b;
    case Operation::Or:
      return a | b;
    case Operation::Xor:
      return a ^ b;
    default:
      return b;
  }
}

// One element's new bits. Packed halves are added one by one, each rounded once.
uint64_t apply(const AtomicDetail& d, uint64_t old, uint64_t b, uint64_t c) {
  if (d.operation == Operation::Exchange) return b;
  if (d.operation == Operation::CompareAndSwap) return old == b ? c : old;
  if (d.type.is_float() && d.type.bits == 16) {
    uint64_t result = 0;
    for (int i = 0; i < d.type.count; ++i) {
      const auto x = static_cast<uint16_t>(old >> (16 * i)),
                 y = static_cast<uint16_t>(b >> (16 * i));
      const bool half = d.type.cls == Type::Class::Float;
      const double sum = half ? floating(d.operation, decode<Binary16>(x), decode<Binary16>(y))
                              : floating(d.operation, decode<BFloat16>(x), decode<BFloat16>(y));
      result |= static_cast<uint64_t>(half ? encode<Binary16>(sum) : encode<BFloat16>(sum))
                << (16 * i);
    }
    return result;
  }
  if (d.type.is_float()) {
    return d.type.bits == 32 ? bits_of(floating(d.operation, as<float>(old), as<float>(b)))
                             : bits_of(floating(d.operation, as<double>(old), as<double>(b)));
  }
  if (d.type.bits == 32) {
    return d.type.is_signed() ? bits_of(integral(d.operation, as<int32_t>(old), as<int32_t>(b)))
                              : bits_of(integral(d.operation, as<uint32_t>(old), as<uint32_t>(b)));
  }
  return d.type.is_signed() ? bits_of(integral(d.operation, as<int64_t>(old), as<int64_t>(b)))
                            : bits_of(integral(d.operation, as<uint64_t>(old), as<uint64_t>(b)));
}

// slots: address, then for each element d, b, c (d and c may be invalid).
void run_atomic(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const AtomicDetail&>(*step.detail);
  const int size = detail.type.bytes(), bytes = size * detail.elements;
  Request request(warp, step, active, detail.memory, bytes);
  Block& block = warp.block();
  Launch& launch = block.launch();
  Ordering ordering = detail.memory.ordering;
  ordering.strong = true;
  bool changed = false;
  for_each_lane(active, [&](int l) {
    const bool shared = request.space(l) == ptx::Space::Shared;
    const uint64_t address = request.address(l);
    uint8_t value[32] = {}, undefined[32] = {}, unknown[32] = {};
    if (shared) {
      const auto at = static_cast<uint32_t>(address);
      if (at % static_cast<uint32_t>(bytes) != 0 ||
          !block.shared().inside(at, static_cast<uint64_t>(bytes))) {
        block.shared().load(warp, step, l, at, bytes, value, undefined);  // refuses, and says so
        return;
      }
      if (block.settings().check_races) {
        SharedRaces::Access access{&warp, &step, l, at, static_cast<uint32_t>(bytes), true};
        access.atomic = true;
        block.shared().races.access(access);
        launch.races.observe(address | kSharedWindow, warp, l, ordering);
      }
      std::memcpy(value, block.shared().data(at), static_cast<size_t>(bytes));
      std::memcpy(undefined, block.shared().undefined(at), static_cast<size_t>(bytes));
    } else if (!load_global(warp, step, l, address, bytes, ordering, value, undefined)) {
      return;
    }
    for (int e = 0; e < detail.elements; ++e) {
      const Slot* slots = step.slots.data() + 1 + 3 * e;
      uint64_t old = 0, old_unknown = 0;
      std::memcpy(&old, value + e * size, static_cast<size_t>(size));
      std::memcpy(&old_unknown, undefined + e * size, static_cast<size_t>(size));
      const uint64_t b = warp.value(slots[1], l);
      const uint64_t c = slots[2].valid ? warp.value(slots[2], l) : 0;
      uint64_t b_unknown = warp.undefined_of<uint64_t>(slots[1], l);
      if (slots[2].valid) b_unknown |= warp.undefined_of<uint64_t>(slots[2], l);
      const uint64_t result = apply(detail, old, b, c);
      changed = changed || result != old;
      std::memcpy(value + e * size, &result, static_cast<size_t>(size));
      const bool tainted =
          b_unknown != 0 || (old_unknown != 0 && detail.operation != Operation::Exchange);
      std::memset(unknown + e * size, tainted ? 0xff : 0, static_cast<size_t>(size));
      if (slots[0].valid) {
        warp.store_lane(slots[0], l, old);
        if (old_unknown != 0) warp.set_undefined(slots[0], l, old_unknown);
      }
    }
    if (shared) {
      const auto at = static_cast<uint32_t>(address);
      std::memcpy(block.shared().data(at), value, static_cast<size_t>(bytes));
      std::memcpy(block.shared().undefined(at), unknown, static_cast<size_t>(bytes));
      if (changed) block.changed();
      if (block.settings().check_races)
        launch.races.publish(address | kSharedWindow, warp, l, ordering);
    } else {
      store_global(warp, step, l, address, bytes, ordering, value, unknown);
    }
  });
  warp.polled(step, changed);
}

void bind_atomic(Binder& b, bool returns) {
  const auto detail = std::make_shared<AtomicDetail>();
  detail->returns = returns;
  detail->memory.ordering.strong = true;
  if (b.next() == "async") b.unsupported("red.async");
  detail->memory.take_modifiers(b);
  const std::string name = b.next();
  static const std::map<std::string, Operation> kOperations = {
      {"add", Operation::Add},       {"min", Operation::Min},
      {"max", Operation::Max},       {"inc", Operation::Increment},
      {"dec", Operation::Decrement}, {"and", Operation::And},
      {"or", Operation::Or},         {"xor", Operation::Xor},
      {"exch", Operation::Exchange}, {"cas", Operation::CompareAndSwap}};
  const auto found = kOperations.find(name);
  if (found == kOperations.end()) b.unsupported("the operation `" + name + "`");
  detail->operation = found->second;
  b.take(name);
  // libcu++ writes the semantics and the scope behind the operation.
  detail->memory.take_modifiers(b);
  b.take("noftz");
  for (const int n : {2, 4, 8}) {
    if (b.take("v" + std::to_string(n))) detail->elements = n;
  }
  detail->type = b.type();
  detail->memory.take_modifiers(b);
  b.done();
  const int bytes = detail->type.bytes();
  const bool moves =
      detail->operation == Operation::Exchange || detail->operation == Operation::CompareAndSwap;
  if (bytes * detail->elements > 16 || (bytes < 4 && !detail->type.is_float() && !moves))
    b.unsupported("the width");
  if (detail->type.is_float() && detail->operation != Operation::Add &&
      detail->operation != Operation::Min && detail->operation != Operation::Max) {
    b.unsupported("the operation on floating-point numbers");
  }
  int operand = returns ? 1 : 0;
  b.step.slots = {detail->memory.take_address(b, operand++)};
  const bool compares = detail->operation == Operation::CompareAndSwap;
  const auto element = [&](int o, int e) -> const ptx::Operand& {
    const ptx::Operand& whole = b.operand(o);
    if (detail->elements == 1) return whole;
    if (static_cast<int>(whole.elements.size()) != detail->elements)
      b.unsupported("a vector of another length");
    return whole.elements[static_cast<size_t>(e)];
  };
  for (int e = 0; e < detail->elements; ++e) {
    b.step.slots.push_back(returns ? b.destination(element(0, e), detail->type) : Slot{});
    b.step.slots.push_back(b.source(element(operand, e), detail->type));
    b.step.slots.push_back(compares ? b.source(element(operand + 1, e), detail->type) : Slot{});
  }
  b.step.detail = detail;
  b.step.run = run_atomic;
}

void bind_atom(Binder& b) {
  bind_atomic(b, true);
}
void bind_red(Binder& b) {
  bind_atomic(b, false);
}

}  // namespace

void add_atomic(Opcodes& opcodes) {
  opcodes.add("atom", bind_atom);
  opcodes.add("red", bind_red);
}

}  // namespace emulator
