// cp.async: 4 to 16 bytes from global to shared memory, by groups (PTX ISA 9.7.9.25, "Asynchronous
// copy").
#include <cstring>
#include <memory>

#include "async/async_copies.h"
#include "async/mbarrier.h"
#include "core/address_space.h"
#include "core/binder.h"
#include "core/block.h"
#include "core/launch.h"
#include "instructions/memory_operand.h"
#include "memory/global_access.h"

namespace emulator {

namespace {

using ptx::Type;

const Type kB32{Type::Class::Bits, 32, 1};

struct CopyDetail : Detail {
  int bytes = 0;
  int64_t source_offset = 0, destination_offset = 0;
  bool ignores = false;  // an ignore-src predicate instead of a source size
  bool ignore_negated = false;
};

void land(Block& block, Warp& warp, int lane, const AsyncCopy& copy) {
  SharedMemory& shared = block.shared();
  std::memcpy(shared.data(copy.address), copy.value, copy.bytes);
  std::memcpy(shared.undefined(copy.address), copy.undefined, copy.bytes);
  if (block.settings().check_races) shared.races.end_by_lane(warp, lane, copy.ticket);
}

// slots: destination, source, source size or ignore-src (may be invalid).
void run_copy(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const CopyDetail&>(*step.detail);
  const Slot &destination = step.slots[0], &source = step.slots[1], &size = step.slots[2];
  warp.require_defined(step, destination, active, "is used as an address");
  Block& block = warp.block();
  uint32_t to[kLanes] = {};
  uint64_t from[kLanes] = {};
  LaneMask reads = 0;
  int source_bytes[kLanes] = {};
  for_each_lane(active, [&](int l) {
    uint64_t address =
        warp.value(destination, l) + static_cast<uint64_t>(detail.destination_offset);
    if (in_window(address, kSharedWindow)) address -= kSharedWindow;
    to[l] = static_cast<uint32_t>(address);
    from[l] = warp.value(source, l) + static_cast<uint64_t>(detail.source_offset);
    source_bytes[l] = detail.bytes;
    if (detail.ignores) {
      const bool ignored = ((warp.predicate(size) >> l & 1) != 0) != detail.ignore_negated;
      if (ignored) source_bytes[l] = 0;
    } else if (size.valid) {
      source_bytes[l] = static_cast<int>(warp.value(size, l) & 0xffff'ffff);
    }
    if (source_bytes[l] != 0) reads |= lane_bit(l);
  });
  if (size.valid) warp.require_defined(step, size, active, "is a copy's size");
  warp.require_defined(step, source, reads, "is used as an address");
  if (reads != 0) block.counters().global_request(step, from, reads, detail.bytes);
  block.counters().shared_request(step, to, active, detail.bytes);
  for_each_lane(active, [&](int l) {
    AsyncCopy copy;
    copy.address = to[l];
    copy.bytes = static_cast<uint32_t>(detail.bytes);
    copy.ticket = 0;
    std::memset(copy.value, 0, sizeof copy.value);
    std::memset(copy.undefined, 0, sizeof copy.undefined);
    if (source_bytes[l] > detail.bytes) {
      warp.report(Check::OutOfBounds, step, l,
                  "a source of " + std::to_string(source_bytes[l]) + " bytes for a copy of " +
                      std::to_string(detail.bytes));
      source_bytes[l] = detail.bytes;
    }
    if (source_bytes[l] == detail.bytes) {
      load_global(warp, step, l, from[l], detail.bytes, {}, copy.value, copy.undefined);
    } else {
      // A part of the bytes, the rest zeros: only that part must be there.
      if (source_bytes[l] != 0 && from[l] % static_cast<uint64_t>(detail.bytes) != 0) {
        warp.report(Check::Misaligned, step, l,
                    "a source address that is not a multiple of " + std::to_string(detail.bytes));
      }
      for (int i = 0; i < source_bytes[l]; ++i) {
        load_global(warp, step, l, from[l] + static_cast<uint64_t>(i), 1, {}, copy.value + i,
                    copy.undefined + i);
      }
    }
    SharedMemory& shared = block.shared();
    if (copy.address % copy.bytes != 0 || !shared.inside(copy.address, copy.bytes)) {
      shared.store(warp, step, l, copy.address, detail.bytes, copy.value,
                   copy.undefined);  // refuses, and says so
      return;
    }
    if (block.settings().check_races) {
      copy.ticket = shared.races.begin({&warp, &step, l, copy.address, copy.bytes, true});
    }
    // Until it lands, what lies there is neither old nor new.
    std::memset(shared.undefined(copy.address), 0xff, copy.bytes);
    block.async.copies[static_cast<size_t>(warp.thread(l))].open.push_back(copy);
  });
}

void run_commit(Warp& warp, const Step&, LaneMask active) {
  for_each_lane(active, [&](int l) {
    ThreadCopies& copies = warp.block().async.copies[static_cast<size_t>(warp.thread(l))];
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
  });
}

// immediate[0]: the groups that may stay under way; -1: none, and what was not committed neither.
void run_wait(Warp& warp, const Step& step, LaneMask active) {
  Block& block = warp.block();
  const int64_t pending = step.immediate[0];
  for_each_lane(active, [&](int l) {
    ThreadCopies& copies = block.async.copies[static_cast<size_t>(warp.thread(l))];
    while (static_cast<int64_t>(copies.groups.size()) > std::max<int64_t>(pending, 0)) {
      for (const AsyncCopy& copy : copies.groups.front()) land(block, warp, l, copy);
      copies.groups.pop_front();
    }
    if (pending < 0) {
      for (const AsyncCopy& copy : copies.open) land(block, warp, l, copy);
      copies.open.clear();
    }
  });
}

// cp.async.mbarrier.arrive: arrives when the lane's copies so far have landed, at some time after
// now.
void run_mbarrier_arrive(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const CopyDetail&>(*step.detail);
  Block& block = warp.block();
  const bool increments = step.immediate[0] == 0;
  warp.require_defined(step, step.slots[0], active, "is used as an address");
  for_each_lane(active, [&](int l) {
    uint64_t wide = warp.value(step.slots[0], l) + static_cast<uint64_t>(detail.destination_offset);
    if (in_window(wide, kSharedWindow)) wide -= kSharedWindow;
    const auto address = static_cast<uint32_t>(wide);
    MBarrier* barrier = find_mbarrier(warp, step, l, address);
    if (barrier == nullptr) return;
    if (increments) ++barrier->pending;
    auto copies = std::make_shared<std::vector<AsyncCopy>>();
    ThreadCopies& mine = block.async.copies[static_cast<size_t>(warp.thread(l))];
    for (std::vector<AsyncCopy>& group : mine.groups) {
      copies->insert(copies->end(), group.begin(), group.end());
      group.clear();
    }
    copies->insert(copies->end(), mine.open.begin(), mine.open.end());
    mine.open.clear();
    block.async.bulk.push_back({[&warp, &step, l, address, copies] {
      Block& block = warp.block();
      const auto found = block.async.mbarriers.find(address);
      if (found == block.async.mbarriers.end()) return;
      MBarrier& barrier = found->second;
      const uint32_t epoch = block.advance(barrier.agent);
      for (const AsyncCopy& copy : *copies) {
        SharedMemory& shared = block.shared();
        std::memcpy(shared.data(copy.address), copy.value, copy.bytes);
        std::memcpy(shared.undefined(copy.address), copy.undefined, copy.bytes);
        if (block.settings().check_races)
          shared.races.end_by_agent(barrier.agent, epoch, copy.ticket);
      }
      barrier.gathering.ordered.raise(barrier.agent, epoch);
      arrive_on(warp, step, l, barrier, 1);
    }});
  });
}

}  // namespace

void bind_cp_async(Binder& b) {
  if (b.take("commit_group")) {
    b.done();
    b.step.run = run_commit;
    return;
  }
  if (b.take("wait_group") || b.next() == "wait_all") {
    b.step.immediate[0] = b.take("wait_all") ? -1 : b.immediate(0);
    b.done();
    b.step.run = run_wait;
    return;
  }
  const auto detail = std::make_shared<CopyDetail>();
  b.step.detail = detail;
  if (b.take("mbarrier")) {
    if (!b.take("arrive")) b.unsupported("cp.async.mbarrier");
    b.step.immediate[0] = b.take("noinc");
    for (const char* space : {"shared", "shared::cta"}) b.take(space);
    if (!b.take("b64")) b.unsupported("a type");
    b.done();
    b.step.slots = {b.address(0, &detail->destination_offset)};
    b.step.run = run_mbarrier_arrive;
    return;
  }
  const bool only_l2 = b.take("cg");
  if (!only_l2 && !b.take("ca")) b.unsupported("the kind of cp.async");
  if (!b.take("shared") && !b.take("shared::cta")) b.unsupported("the destination's state space");
  if (!b.take("global")) b.unsupported("the source's state space");
  b.take("L2::cache_hint");
  for (const char* size : {"64B", "128B", "256B"}) b.take(std::string("L2::") + size);
  b.done();
  detail->bytes = static_cast<int>(b.immediate(2));
  if (detail->bytes != 16 && (only_l2 || (detail->bytes != 4 && detail->bytes != 8))) {
    b.unsupported("a copy of " + std::to_string(detail->bytes) + " bytes");
  }
  b.step.slots = {b.address(0, &detail->destination_offset), b.address(1, &detail->source_offset),
                  Slot{}};
  if (b.operand_count() > 3) {
    const ptx::Operand& third = b.operand(3);
    // A predicate says that the source is ignored; a 32-bit operand is its size; a 64-bit one is a
    // cache policy.
    if (third.kind == ptx::Operand::Kind::Register && b.width_of(third) == 0) {
      detail->ignores = true;
      b.step.slots[2] = b.predicate(third, &detail->ignore_negated);
    } else if (third.kind != ptx::Operand::Kind::Register || b.width_of(third) == 4) {
      b.step.slots[2] = b.source(third, kB32);
    }
  }
  b.step.run = run_copy;
}

}  // namespace emulator
