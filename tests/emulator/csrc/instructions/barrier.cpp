// Barriers of a block (bar, barrier), of a cluster, and fences (PTX ISA 9.7.13, "Parallel
// Synchronization").
#include "core/binder.h"
#include "core/block.h"
#include "core/launch.h"
#include "core/warp.h"
#include "races/global_races.h"

namespace emulator {

void run_bar_warp_sync(Warp& warp, const Step& step, LaneMask active);

namespace {

using ptx::Type;

const Type kB32{Type::Class::Bits, 32, 1};
const Type kPredicate{Type::Class::Predicate, 0, 1};

enum class Reduction { None, And, Or, Count };

struct BarrierDetail : Detail {
  bool arrive_only = false;
  bool counted = false;
  Reduction reduction = Reduction::None;
  bool negated = false;  // the predicate that is reduced
};

void finish_reduction(Warp& warp, const Step& step, LaneMask lanes, const NamedBarrier& barrier) {
  const auto& detail = static_cast<const BarrierDetail&>(*step.detail);
  const Slot& d = step.slots[2];
  if (detail.reduction == Reduction::Count) {
    for_each_lane(
        lanes, [&](int l) { warp.store_lane(d, l, static_cast<uint64_t>(barrier.reduced_count)); });
  } else {
    const bool value =
        detail.reduction == Reduction::And ? barrier.reduced_and : barrier.reduced_or;
    warp.store_predicate(d, value ? kAllLanes : 0, lanes);
  }
}

// slots: the barrier's number, the count of threads, and of a reduction: d, the predicate.
void run_barrier(Warp& warp, const Step& step, LaneMask) {
  const auto& detail = static_cast<const BarrierDetail&>(*step.detail);
  // .aligned or not, the hardware counts whole warps: the lanes of one that are alive come
  // together.
  if (!warp.gather(step, step.immediate[0] != 0 ? warp.live() : warp.group().lanes)) return;
  const LaneMask lanes = warp.group().lanes;
  warp.require_defined(step, step.slots[0], lanes, "names a barrier");
  const auto number = warp.value(step.slots[0], first_lane(lanes));
  if (number >= Block::kBarriers) {
    warp.report(Check::Barrier, step, first_lane(lanes),
                "barrier " + std::to_string(number) + ": there are 16");
    throw LaunchEnd("a barrier that does not exist");
  }
  Block& block = warp.block();
  NamedBarrier& barrier = block.barriers[number];
  int expected = block.threads();
  if (detail.counted) {
    warp.require_defined(step, step.slots[1], lanes, "is a barrier's count");
    expected = static_cast<int>(warp.value(step.slots[1], first_lane(lanes)));
    if (expected % kLanes != 0 || expected == 0) {
      warp.report(
          Check::Barrier, step, first_lane(lanes),
          "a count of " + std::to_string(expected) + " threads: not a positive multiple of 32");
    }
    if (expected > block.warps() * kLanes) {
      warp.report(Check::Barrier, step, first_lane(lanes),
                  "a count of " + std::to_string(expected) + " threads in a block of " +
                      std::to_string(block.threads()));
    }
  }
  if (barrier.arrived > 0 && barrier.expected != expected) {
    warp.report(Check::Barrier, step, first_lane(lanes),
                "a count of " + std::to_string(expected) + " threads, where others came with " +
                    std::to_string(barrier.expected));
  }
  barrier.expected = expected;
  barrier.counted = detail.counted;
  // The hardware counts a warp as 32 threads; a partial last warp of the block counts as its own.
  barrier.arrived += detail.counted ? kLanes : count(lanes);
  barrier.gathered.add(warp, lanes);
  ++warp.epoch;
  if (detail.reduction != Reduction::None) {
    warp.require_defined(step, step.slots[3], lanes, "is reduced by a barrier");
    LaneMask holds = warp.predicate(step.slots[3]);
    if (detail.negated) holds = ~holds;
    barrier.reduced_and = barrier.reduced_and && (holds & lanes) == lanes;
    barrier.reduced_or = barrier.reduced_or || (holds & lanes) != 0;
    barrier.reduced_count += count(holds & lanes);
  }
  if (detail.arrive_only) {
    warp.advance();
  } else {
    warp.wait();
    barrier.waiters.push_back(
        {&warp, &step, lanes, detail.reduction == Reduction::None ? nullptr : finish_reduction});
  }
  if (barrier.arrived > barrier.expected) {
    warp.report(Check::Barrier, step, first_lane(lanes),
                std::to_string(barrier.arrived) + " threads at a barrier of " +
                    std::to_string(barrier.expected));
  }
  if (barrier.arrived >= barrier.expected) block.complete(barrier);
}

void bind_block_barrier(Binder& b, bool aligned) {
  auto detail = std::make_shared<BarrierDetail>();
  b.take("cta");
  detail->arrive_only = b.take("arrive");
  const bool reduces = !detail->arrive_only && b.take("red");
  if (!detail->arrive_only && !reduces && !b.take("sync")) b.unsupported("the kind of barrier");
  aligned = b.take("aligned") || aligned;
  int operand = 0;
  Slot d, predicate;
  if (reduces) {
    detail->reduction = b.take("and")    ? Reduction::And
                        : b.take("or")   ? Reduction::Or
                        : b.take("popc") ? Reduction::Count
                                         : Reduction::None;
    if (detail->reduction == Reduction::None) b.unsupported("the reduction");
    aligned = b.take("aligned") || aligned;
    const bool counts = detail->reduction == Reduction::Count;
    if (!b.take(counts ? "u32" : "pred")) b.unsupported("a type");
    d = b.destination(operand++, counts ? kB32 : kPredicate);
    predicate = b.predicate(b.operand(b.operand_count() - 1), &detail->negated);
  }
  b.done();
  const Slot number = b.source(operand++, kB32);
  detail->counted = operand < b.operand_count() - (reduces ? 1 : 0);
  const Slot threads = detail->counted ? b.source(operand, kB32) : Slot{};
  b.step.slots = {number, threads, d, predicate};
  b.step.immediate[0] = aligned;
  b.step.detail = detail;
  b.step.flow = Flow::Blocking;
  b.step.run = run_barrier;
}

void run_nothing(Warp&, const Step&, LaneMask) {}

// A cluster of one block: its barrier is over the block's threads, which arrive and wait apart.
void run_cluster_arrive(Warp& warp, const Step&, LaneMask active) {
  Block& block = warp.block();
  ClusterBarrier& barrier = block.cluster_barrier;
  barrier.gathering.add(warp, active);
  ++warp.epoch;
  barrier.arrived += count(active);
  warp.advance();
  if (barrier.arrived < block.threads()) return;
  barrier.known = GatheredRef(barrier.gathering);
  barrier.gathering.clear();
  barrier.arrived = 0;
  ++barrier.completed;
  block.progressed();
  for (size_t i = 0; i < barrier.waiters.size();) {
    const ClusterBarrier::Waiter waiter = barrier.waiters[i];
    if (waiter.phase > barrier.completed) {
      ++i;
      continue;
    }
    barrier.known.acquire(*waiter.warp, waiter.lanes);
    waiter.warp->resume(waiter.lanes);
    barrier.waiters.erase(barrier.waiters.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void run_cluster_wait(Warp& warp, const Step&, LaneMask active) {
  ClusterBarrier& barrier = warp.block().cluster_barrier;
  if (barrier.waits.empty())
    barrier.waits.resize(static_cast<size_t>(warp.block().warps()) * kLanes);
  uint32_t phase = 0;
  for_each_lane(active,
                [&](int l) { phase = ++barrier.waits[static_cast<size_t>(warp.thread(l))]; });
  if (phase <= barrier.completed) {
    barrier.known.acquire(warp, active);
    warp.advance();
  } else {
    warp.wait();
    barrier.waiters.push_back({&warp, active, phase});
  }
}

void bind_cluster_barrier(Binder& b) {
  const bool arrive = b.take("arrive");
  if (!arrive && !b.take("wait")) b.unsupported("the kind of cluster barrier");
  b.take("release");
  b.take("acquire");
  b.take("relaxed");
  b.take("aligned");
  b.done();
  b.step.flow = Flow::Blocking;
  b.step.run = arrive ? run_cluster_arrive : run_cluster_wait;
}

void bind_bar(Binder& b) {
  if (b.take("warp")) {
    if (!b.take("sync")) b.unsupported("the kind of barrier");
    b.done();
    b.step.slots = {b.source(0, kB32)};
    b.step.flow = Flow::Blocking;
    b.step.run = run_bar_warp_sync;
    return;
  }
  bind_block_barrier(b, true);
}

void bind_barrier(Binder& b) {
  if (b.take("cluster")) {
    bind_cluster_barrier(b);
  } else {
    bind_block_barrier(b, false);
  }
}

void run_fence(Warp& warp, const Step&, LaneMask active) {
  GlobalRaces::fence(warp, active);
}

// fence.proxy.async: what the lanes know by now, their own accesses included, the async proxy sees
// as well.
void run_proxy_fence(Warp& warp, const Step&, LaneMask active) {
  for_each_lane(active, [&](int l) {
    Knowledge& known = warp.known[l];
    known.proxied = join(known.proxied,
                         std::make_shared<const Clock>(with_own(known.ordered, warp, lane_bit(l))));
  });
  ++warp.epoch;
}

void bind_fence(Binder& b) {
  b.step.run = run_fence;
  if (b.take("proxy")) {
    b.step.run = b.take("async") || b.take("async::generic") ? run_proxy_fence : run_nothing;
    return;
  }
  if (b.take("mbarrier_init")) {  // shows the initialised mbarriers to the async proxy
    b.step.run = run_proxy_fence;
    return;
  }
  b.take("acq_rel");
  b.take("sc");
  b.take("acquire");
  b.take("release");
  // A fence within the block orders nothing for other blocks.
  if (b.take("cta")) b.step.run = run_nothing;
}

void bind_membar(Binder& b) {
  if (b.take("proxy")) b.unsupported("membar.proxy");
  b.step.run = b.take("cta") ? run_nothing : run_fence;
}

}  // namespace

void add_barrier(Opcodes& opcodes) {
  opcodes.add("bar", bind_bar);
  opcodes.add("barrier", bind_barrier);
  opcodes.add("fence", bind_fence);
  opcodes.add("membar", bind_membar);
}

}  // namespace emulator
