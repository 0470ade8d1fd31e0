#include "async/mbarrier.h"

#include <memory>

#include "core/address_space.h"
#include "core/binder.h"
#include "instructions/memory_operand.h"
#include "runtime/machine.h"

namespace emulator {

namespace {

void complete_phase(Block& block, MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.transactions != 0) return;
  barrier.completed = GatheredRef(barrier.gathering);
  barrier.gathering.clear();
  barrier.pending = barrier.expected;
  ++barrier.phase;
  block.progressed();
}

}  // namespace

MBarrier* find_mbarrier(Warp& warp, const Step& step, int lane, uint32_t address) {
  Block& block = warp.block();
  const auto found = block.async.mbarriers.find(address);
  if (found == block.async.mbarriers.end()) {
    warp.report(Check::Barrier, step, lane,
                "no mbarrier was initialised at " + block.shared().describe(address));
    return nullptr;
  }
  if (block.settings().check_races) {
    SharedRaces::Access access{&warp, &step, lane, address, 8, true};
    access.atomic = true;
    block.shared().races.access(access);
  }
  return &found->second;
}

void arrive_on(Warp& warp, const Step& step, int lane, MBarrier& barrier, uint32_t count) {
  if (barrier.pending < count) {
    warp.report(Check::Barrier, step, lane,
                std::to_string(count) + " arrivals at an mbarrier whose phase lacks only " +
                    std::to_string(barrier.pending) + " of " + std::to_string(barrier.expected));
    count = barrier.pending;
  }
  barrier.pending -= count;
  warp.block().progressed();
  complete_phase(warp.block(), barrier);
}

void change_transactions(Block& block, MBarrier& barrier, int64_t bytes) {
  barrier.transactions += bytes;
  block.progressed();
  if (bytes < 0) complete_phase(block, barrier);
}

void require_initialised_for_proxy(Warp& warp, const Step& step, int lane,
                                   const MBarrier& barrier) {
  const ClockRef& proxied = warp.known[lane].proxied;
  if (proxied && proxied->at(barrier.initialised_by) >= barrier.initialised_at) return;
  warp.report(Check::Proxy, step, lane,
              "signals an mbarrier whose initialisation no fence.mbarrier_init or "
              "fence.proxy.async has shown to the "
              "async proxy");
}

namespace {

using ptx::Type;

const Type kB32{Type::Class::Bits, 32, 1};
const Type kB64{Type::Class::Bits, 64, 1};
const Type kPredicate{Type::Class::Predicate, 0, 1};

struct MBarrierDetail : Detail {
  MemoryOperand memory;
  bool release = true;   // of an arrival; the default of the ISA
  bool acquire = true;   // of a wait
  bool expects = false;  // arrive.expect_tx
  bool drops = false;
  bool parity = false;
};

uint32_t address_of(const MBarrierDetail& detail, Warp& warp, const Step& step, int lane) {
  warp.require_defined(step, step.slots[0], lane_bit(lane), "is used as an address");
  uint64_t address = warp.value(step.slots[0], lane) + static_cast<uint64_t>(detail.memory.offset);
  if (detail.memory.space == ptx::Space::Generic) resolve_generic(address, &address);
  return static_cast<uint32_t>(address);
}

// slots: address, count.
void run_init(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const MBarrierDetail&>(*step.detail);
  Block& block = warp.block();
  for_each_lane(active, [&](int l) {
    const uint32_t address = address_of(detail, warp, step, l);
    const uint8_t zeros[8] = {};
    if (!block.shared().store(warp, step, l, address, 8, zeros, zeros)) return;
    warp.require_defined(step, step.slots[1], lane_bit(l), "is an mbarrier's count");
    MBarrier barrier;
    const auto old = block.async.mbarriers.find(address);
    barrier.agent = old != block.async.mbarriers.end() ? old->second.agent : block.new_agent();
    barrier.expected = barrier.pending = static_cast<uint32_t>(warp.value(step.slots[1], l));
    if (barrier.expected == 0 || barrier.expected >= 1u << 20) {
      warp.report(
          Check::Barrier, step, l,
          "an mbarrier of " + std::to_string(barrier.expected) + " arrivals: 1 to 2^20 - 1");
    }
    barrier.initialised_by = warp.thread(l);
    barrier.initialised_at = warp.epoch;
    block.async.mbarriers[address] = std::move(barrier);
  });
}

// slots: address.
void run_inval(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const MBarrierDetail&>(*step.detail);
  Block& block = warp.block();
  for_each_lane(active, [&](int l) {
    const uint32_t address = address_of(detail, warp, step, l);
    if (find_mbarrier(warp, step, l, address) == nullptr) return;
    const uint8_t zeros[8] = {}, unknown[8] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    block.shared().store(warp, step, l, address, 8, zeros, unknown);
    block.async.mbarriers.erase(address);
  });
}

// slots: address, state, operand (arrivals, or the bytes that are expected).
void run_arrive(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const MBarrierDetail&>(*step.detail);
  Block& block = warp.block();
  bool released = false;
  for_each_lane(active, [&](int l) {
    MBarrier* barrier = find_mbarrier(warp, step, l, address_of(detail, warp, step, l));
    if (barrier == nullptr) return;
    uint64_t operand = 1;
    if (step.slots[2].valid) {
      warp.require_defined(step, step.slots[2], lane_bit(l), "is an mbarrier's count");
      operand = warp.value(step.slots[2], l) & 0xffff'ffff;
    }
    if (detail.release) {
      barrier->gathering.add(warp, lane_bit(l));
      released = true;
    }
    // The state is the phase that the arrival belongs to.
    if (step.slots[1].valid) warp.store_lane(step.slots[1], l, barrier->phase);
    if (detail.expects) change_transactions(block, *barrier, static_cast<int64_t>(operand));
    if (detail.drops) --barrier->expected;
    arrive_on(warp, step, l, *barrier, detail.expects ? 1 : static_cast<uint32_t>(operand));
  });
  if (released) ++warp.epoch;
}

// slots: address, bytes; immediate[0]: +1 announces, -1 completes.
void run_transactions(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const MBarrierDetail&>(*step.detail);
  for_each_lane(active, [&](int l) {
    MBarrier* barrier = find_mbarrier(warp, step, l, address_of(detail, warp, step, l));
    if (barrier == nullptr) return;
    warp.require_defined(step, step.slots[1], lane_bit(l), "is an mbarrier's count of bytes");
    change_transactions(
        warp.block(), *barrier,
        step.immediate[0] * static_cast<int64_t>(warp.value(step.slots[1], l) & 0xffff'ffff));
  });
}

// slots: address, predicate, state or parity.
void run_wait(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const MBarrierDetail&>(*step.detail);
  LaneMask done = 0;
  for_each_lane(active, [&](int l) {
    MBarrier* barrier = find_mbarrier(warp, step, l, address_of(detail, warp, step, l));
    if (barrier == nullptr) return;
    warp.require_defined(step, step.slots[2], lane_bit(l), "is an mbarrier's phase");
    const uint64_t phase = warp.value(step.slots[2], l);
    const bool complete =
        detail.parity ? (barrier->phase & 1) != (phase & 1) : barrier->phase != phase;
    if (!complete) return;
    done |= lane_bit(l);
    if (detail.acquire) barrier->completed.acquire(warp, lane_bit(l));
  });
  warp.store_predicate(step.slots[1], done, active);
  // Who waits lets others go on; then it asks again, as the loop around try_wait does.
  if (done != active) warp.yield();
  warp.advance();
}

void take_semantics(Binder& b, MBarrierDetail* detail) {
  if (b.take("relaxed")) {
    detail->release = detail->acquire = false;
  } else {
    b.take("release");
    b.take("acquire");
  }
  b.take("cta");
  b.take("cluster");
  for (const char* space : {"shared", "shared::cta", "shared::cluster"}) {
    if (b.take(space)) detail->memory.space = ptx::Space::Shared;
  }
}

void bind_mbarrier(Binder& b) {
  const auto detail = std::make_shared<MBarrierDetail>();
  const std::string name = b.next();
  b.take(name);
  b.step.detail = detail;
  if (name == "arrive" || name == "arrive_drop") {
    detail->drops = name == "arrive_drop";
    detail->expects = b.take("expect_tx");
    b.take("noComplete");
    take_semantics(b, detail.get());
    if (!b.take("b64")) b.unsupported("a type");
    b.done();
    // The state may be left out where nobody wants it.
    const bool has_state = b.operand(0).kind != ptx::Operand::Kind::Address;
    const int address = has_state ? 1 : 0;
    b.step.slots = {detail->memory.take_address(b, address),
                    has_state ? b.destination(0, kB64) : Slot{},
                    b.operand_count() > address + 1 ? b.source(address + 1, kB32) : Slot{}};
    b.step.run = run_arrive;
    return;
  }
  if (name == "test_wait" || name == "try_wait") {
    detail->parity = b.take("parity");
    take_semantics(b, detail.get());
    if (!b.take("b64")) b.unsupported("a type");
    b.done();
    b.step.slots = {detail->memory.take_address(b, 1), b.destination(0, kPredicate),
                    b.source(2, detail->parity ? kB32 : kB64)};
    b.step.flow = Flow::Blocking;
    b.step.run = run_wait;
    return;
  }
  take_semantics(b, detail.get());
  if (name == "init" || name == "inval") {
    if (!b.take("b64")) b.unsupported("a type");
    b.done();
    b.step.slots = {detail->memory.take_address(b, 0)};
    if (name == "init") b.step.slots.push_back(b.source(1, kB32));
    b.step.run = name == "init" ? run_init : run_inval;
  } else if (name == "expect_tx" || name == "complete_tx") {
    b.take("b64");
    b.done();
    b.step.slots = {detail->memory.take_address(b, 0), b.source(1, kB32)};
    b.step.immediate[0] = name == "expect_tx" ? 1 : -1;
    b.step.run = run_transactions;
  } else {
    b.unsupported("mbarrier." + name);
  }
}

// mapa: the address of a variable in another block of the cluster, which here is always this one.
void bind_mapa(Binder& b) {
  for (const char* space : {"shared::cluster", "shared"}) b.take(space);
  const Type type = b.type();
  b.done();
  b.step.slots = {b.destination(0, type), b.source(1, type), b.source(2, kB32)};
  b.step.run = [](Warp& warp, const Step& step, LaneMask active) {
    warp.require_defined(step, step.slots[2], active, "names a block of the cluster");
    for_each_lane(active, [&](int l) {
      if (warp.value(step.slots[2], l) != 0)
        warp.report(Check::OutOfBounds, step, l, "a cluster has one block here");
      const uint64_t address = warp.value(step.slots[1], l);
      const auto unknown = warp.undefined_of<uint64_t>(step.slots[1], l);
      warp.store_lane(step.slots[0], l, address);
      if (unknown != 0) warp.set_undefined(step.slots[0], l, unknown);
    });
  };
}

}  // namespace

void add_mbarrier(Opcodes& opcodes) {
  opcodes.add("mbarrier", bind_mbarrier);
  opcodes.add("mapa", bind_mapa);
}

}  // namespace emulator
