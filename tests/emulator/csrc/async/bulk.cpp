// Bulk copies, plain and by tensor map (PTX ISA 9.7.9.25.4, "Non-tensor copy", and .5, "Tensor
// copy").
//
// They belong to the async proxy. Into shared memory: the bytes land, and the mbarrier hears of
// them, when nothing else in the block can go on. Out of shared memory: when the thread waits for
// the group, or ends.
#include <algorithm>
#include <cstring>
#include <memory>

#include "async/async_copies.h"
#include "async/mbarrier.h"
#include "common/error.h"
#include "core/address_space.h"
#include "core/binder.h"
#include "core/block.h"
#include "core/launch.h"
#include "memory/global_access.h"
#include "runtime/tensor_map.h"
#include "tensor_core/swizzle.h"

namespace emulator {

namespace {

using ptx::Type;

const Type kB32{Type::Class::Bits, 32, 1};

struct BulkDetail : Detail {
  int dimensions = 0;  // 0: not by tensor map
  int64_t shared_offset = 0, global_offset = 0, barrier_offset = 0;
};

// slots: shared address, global address or tensor map, mbarrier or none, size or the coordinates.
constexpr size_t kShared = 0, kGlobal = 1, kBarrier = 2, kRest = 3;

uint64_t address_in(Warp& warp, const Step& step, int lane, size_t slot, int64_t offset) {
  warp.require_defined(step, step.slots[slot], lane_bit(lane), "is used as an address");
  return warp.value(step.slots[slot], lane) + static_cast<uint64_t>(offset);
}

uint32_t shared_address(Warp& warp, const Step& step, int lane, size_t slot, int64_t offset) {
  uint64_t address = address_in(warp, step, lane, slot, offset);
  if (in_window(address, kSharedWindow)) address -= kSharedWindow;
  return static_cast<uint32_t>(address);
}

// Where the pieces of one copy lie on both sides: contiguous runs within one row of the box.
struct Piece {
  uint32_t shared;  // before swizzling
  uint64_t global;
  uint32_t bytes;
  bool inside;  // of the tensor; what is not is filled, and not stored
};

struct Plan {
  uint32_t shared = 0;
  uint32_t bytes = 0;
  Swizzle mode = Swizzle::None;
  bool nan_fill = false;
  std::vector<Piece> pieces;
};

Swizzle swizzle_of(const TensorMap& map) {
  switch (map.swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return Swizzle::None;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return Swizzle::B32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return Swizzle::B64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return Swizzle::B128;
    default:
      throw Error("a tensor map's swizzle mode " + std::to_string(map.swizzle) +
                  " is not modelled");
  }
}

// The box at `start`, row by row: dimension 0 is contiguous on both sides.
Plan plan_tensor(const TensorMap& map, uint32_t shared, const int32_t* start) {
  Plan plan;
  plan.shared = shared;
  plan.mode = swizzle_of(map);
  plan.nan_fill = map.nan_fill;
  if (map.interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    throw Error("interleaved tensor maps are not modelled");
  uint32_t rows = 1;
  for (int d = 0; d < map.rank; ++d) {
    if (map.element_stride[d] != 1) throw Error("element strides of a tensor map are not modelled");
    if (d > 0) rows *= map.box[d];
  }
  const uint32_t row_bytes = static_cast<uint32_t>(map.box[0]) * map.element_bytes;
  plan.bytes = rows * row_bytes;
  const auto width = static_cast<int64_t>(map.size[0]);
  for (uint32_t row = 0; row < rows; ++row) {
    uint32_t rest = row;
    bool inside = true;
    uint64_t global = map.address;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t at = int64_t{start[d]} + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.size[d]);
      global += static_cast<uint64_t>(at) * map.stride[d - 1];
    }
    const uint32_t to = shared + row * row_bytes;
    const int64_t first =
        inside ? std::clamp<int64_t>(-int64_t{start[0]}, 0, map.box[0]) : map.box[0];
    const int64_t last =
        inside ? std::clamp<int64_t>(width - start[0], first, map.box[0]) : map.box[0];
    const auto piece = [&](int64_t from, int64_t end, bool in) {
      if (from == end) return;
      plan.pieces.push_back({to + static_cast<uint32_t>(from) * map.element_bytes,
                             global + static_cast<uint64_t>((start[0] + from) * map.element_bytes),
                             static_cast<uint32_t>(end - from) * map.element_bytes, in});
    };
    piece(0, first, false);
    piece(first, last, true);
    piece(last, map.box[0], false);
  }
  return plan;
}

// Calls `visit(shared address, global address, bytes)` in aligned units of at most 16 bytes.
template <class Visit>
void for_each_unit(const Plan& plan, const Piece& piece, Visit visit) {
  uint32_t done = 0;
  while (done < piece.bytes) {
    uint32_t unit = 16;
    while ((piece.shared + done) % unit != 0 ||
           (piece.inside && (piece.global + done) % unit != 0) || unit > piece.bytes - done) {
      unit /= 2;
    }
    visit(swizzle(piece.shared + done, plan.mode), piece.global + done, unit);
    done += unit;
  }
}

void fill_outside(const Plan& plan, uint8_t* to, uint32_t bytes) {
  // All ones are a quiet NaN in every format.
  std::memset(to, plan.nan_fill ? 0xff : 0, bytes);
}

bool admissible(Warp& warp, const Step& step, int lane, const Plan& plan, uint32_t alignment) {
  SharedMemory& shared = warp.block().shared();
  if (plan.shared % alignment != 0) {
    warp.report(
        Check::Misaligned, step, lane,
        shared.describe(plan.shared) + " is not a multiple of " + std::to_string(alignment));
    return false;
  }
  if (!shared.inside(plan.shared, plan.bytes)) {
    warp.report(Check::OutOfBounds, step, lane,
                "a bulk copy of " + std::to_string(plan.bytes) + " bytes at " +
                    shared.describe(plan.shared) + " of " + std::to_string(shared.size()) +
                    " bytes");
    return false;
  }
  return true;
}

bool make_plan(Warp& warp, const Step& step, int lane, Plan* plan) {
  const auto& detail = static_cast<const BulkDetail&>(*step.detail);
  const uint32_t shared = shared_address(warp, step, lane, kShared, detail.shared_offset);
  if (detail.dimensions == 0) {
    warp.require_defined(step, step.slots[kRest], lane_bit(lane), "is a copy's size");
    const auto bytes = static_cast<uint32_t>(warp.value(step.slots[kRest], lane));
    const uint64_t global = address_in(warp, step, lane, kGlobal, detail.global_offset);
    if (bytes % 16 != 0 || global % 16 != 0) {
      warp.report(Check::Misaligned, step, lane,
                  "a bulk copy of " + std::to_string(bytes) +
                      " bytes: size and addresses must be multiples of 16");
      return false;
    }
    plan->shared = shared;
    plan->bytes = bytes;
    plan->pieces.push_back({shared, global, bytes, true});
    return admissible(warp, step, lane, *plan, 16);
  }
  const uint64_t at = address_in(warp, step, lane, kGlobal, detail.global_offset);
  uint64_t address = at;
  uint8_t bytes[128];
  const ptx::Space space = resolve_generic(at, &address);
  const std::vector<uint8_t>& parameters = warp.block().launch().parameters;
  DeviceMemory& memory = warp.block().launch().machine.memory;
  if (space == ptx::Space::Parameter && address + sizeof bytes <= parameters.size()) {
    std::memcpy(bytes, parameters.data() + address, sizeof bytes);
  } else if (space == ptx::Space::Global && memory.contains(address, sizeof bytes)) {
    memory.read(address, bytes, sizeof bytes);
  } else {
    warp.report(Check::OutOfBounds, step, lane, "a tensor map where there is no memory");
    return false;
  }
  TensorMap map;
  if (!decode(bytes, &map) || map.rank != detail.dimensions) {
    warp.report(
        Check::Uninitialised, step, lane,
        "these are not a tensor map of " + std::to_string(detail.dimensions) + " dimensions");
    return false;
  }
  int32_t start[5] = {};
  for (int d = 0; d < detail.dimensions; ++d) {
    const Slot& slot = step.slots[kRest + static_cast<size_t>(d)];
    warp.require_defined(step, slot, lane_bit(lane), "is a coordinate");
    start[d] = static_cast<int32_t>(warp.value(slot, lane));
  }
  *plan = plan_tensor(map, shared, start);
  return admissible(warp, step, lane, *plan, 128);
}

// ---- global -> shared
// ----------------------------------------------------------------------------------

void land_load(Warp& warp, const Step& step, int lane, const Plan& plan, uint32_t barrier_address,
               uint32_t ticket) {
  Block& block = warp.block();
  SharedMemory& shared = block.shared();
  for (const Piece& piece : plan.pieces) {
    for_each_unit(plan, piece, [&](uint32_t to, uint64_t from, uint32_t bytes) {
      uint8_t undefined[16] = {}, value[16];
      if (piece.inside) {
        load_global(warp, step, lane, from, static_cast<int>(bytes), {}, value, undefined);
      } else {
        fill_outside(plan, value, bytes);
      }
      std::memcpy(shared.data(to), value, bytes);
      std::memcpy(shared.undefined(to), undefined, bytes);
    });
  }
  const auto found = block.async.mbarriers.find(barrier_address);
  if (found == block.async.mbarriers.end()) return;
  MBarrier& barrier = found->second;
  const uint32_t epoch = block.advance(barrier.agent);
  if (block.settings().check_races) shared.races.end_by_agent(barrier.agent, epoch, ticket);
  barrier.gathering.ordered.raise(barrier.agent, epoch);
  change_transactions(block, barrier, -static_cast<int64_t>(plan.bytes));
}

void run_load(Warp& warp, const Step& step, LaneMask active) {
  const auto& detail = static_cast<const BulkDetail&>(*step.detail);
  Block& block = warp.block();
  for_each_lane(active, [&](int l) {
    const auto plan = std::make_shared<Plan>();
    if (!make_plan(warp, step, l, plan.get())) return;
    const uint32_t barrier_address = shared_address(warp, step, l, kBarrier, detail.barrier_offset);
    const MBarrier* barrier = find_mbarrier(warp, step, l, barrier_address);
    if (barrier == nullptr) return;
    require_initialised_for_proxy(warp, step, l, *barrier);
    uint32_t ticket = 0;
    if (block.settings().check_races) {
      SharedRaces::Access access{&warp, &step, l, plan->shared, plan->bytes, true};
      access.async_proxy = true;
      ticket = block.shared().races.begin(access);
    }
    std::memset(block.shared().undefined(plan->shared), 0xff, plan->bytes);
    block.async.bulk.push_back({[&warp, &step, l, plan, barrier_address, ticket] {
      land_load(warp, step, l, *plan, barrier_address, ticket);
    }});
  });
}

// ---- shared -> global
// ----------------------------------------------------------------------------------

void land_store(Warp& warp, const Step& step, int lane, const Plan& plan, uint32_t ticket,
                bool waited) {
  Block& block = warp.block();
  if (!waited) {
    warp.report(Check::Asynchronous, step, lane,
                "the block ends while this bulk store may still read its shared memory: nobody "
                "waited for it");
  }
  SharedMemory& shared = block.shared();
  for (const Piece& piece : plan.pieces) {
    if (!piece.inside) continue;
    for_each_unit(plan, piece, [&](uint32_t from, uint64_t to, uint32_t bytes) {
      store_global(warp, step, lane, to, static_cast<int>(bytes), {}, shared.data(from),
                   shared.undefined(from));
    });
  }
  if (block.settings().check_races) shared.races.end_by_lane(warp, lane, ticket);
}

bool same_copy(const Plan& a, const Plan& b) {
  return a.shared == b.shared && a.bytes == b.bytes && a.pieces.size() == b.pieces.size() &&
         std::equal(a.pieces.begin(), a.pieces.end(), b.pieces.begin(),
                    [](const Piece& p, const Piece& q) { return p.global == q.global; });
}

void run_store(Warp& warp, const Step& step, LaneMask active) {
  Block& block = warp.block();
  std::shared_ptr<Plan> last;
  for_each_lane(active, [&](int l) {
    const auto plan = std::make_shared<Plan>();
    if (!make_plan(warp, step, l, plan.get())) return;
    // The hardware issues a warp's bulk store once where its lanes agree on it, as CUTLASS relies
    // on.
    if (last && same_copy(*last, *plan)) return;
    last = plan;
    uint32_t ticket = 0;
    if (block.settings().check_races) {
      SharedRaces::Access access{&warp, &step, l, plan->shared, plan->bytes, false};
      access.async_proxy = true;
      ticket = block.shared().races.begin(access);
    }
    block.async.bulk_groups[static_cast<size_t>(warp.thread(l))].open.push_back(
        [&warp, &step, l, plan, ticket](bool waited) {
          land_store(warp, step, l, *plan, ticket, waited);
        });
  });
}

void run_commit(Warp& warp, const Step&, LaneMask active) {
  for_each_lane(active, [&](int l) {
    ThreadBulkGroups& mine = warp.block().async.bulk_groups[static_cast<size_t>(warp.thread(l))];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
  });
}

void run_wait(Warp& warp, const Step& step, LaneMask active) {
  for_each_lane(active, [&](int l) {
    ThreadBulkGroups& mine = warp.block().async.bulk_groups[static_cast<size_t>(warp.thread(l))];
    while (static_cast<int64_t>(mine.groups.size()) > step.immediate[0]) {
      for (const BulkStore& copy : mine.groups.front()) copy(true);
      mine.groups.pop_front();
    }
  });
}

void run_nothing(Warp&, const Step&, LaneMask) {}

}  // namespace

void bind_cp_async_bulk(Binder& b) {
  if (b.take("commit_group")) {
    b.done();
    b.step.run = run_commit;
    return;
  }
  if (b.take("wait_group")) {
    b.take("read");
    b.done();
    b.step.immediate[0] = b.immediate(0);
    b.step.run = run_wait;
    return;
  }
  if (b.take("prefetch")) {
    b.step.run = run_nothing;
    return;
  }
  const auto detail = std::make_shared<BulkDetail>();
  b.step.detail = detail;
  if (b.take("tensor")) {
    const std::string dimensions = b.next();
    if (dimensions.size() != 2 || dimensions[1] != 'd' || dimensions[0] < '1' ||
        dimensions[0] > '5') {
      b.unsupported("the dimensions");
    }
    b.take(dimensions);
    detail->dimensions = dimensions[0] - '0';
  }
  const bool load = b.take("shared::cluster") || b.take("shared::cta");
  if (load ? !b.take("global") : !(b.take("global") && b.take("shared::cta")))
    b.unsupported("the state spaces");
  b.take("tile");
  if (load ? !b.take("mbarrier::complete_tx::bytes") : !b.take("bulk_group"))
    b.unsupported("the completion");
  b.take("L2::cache_hint");
  b.done();
  // Loads: [shared], [global] or [map, {coordinates}], (size,) [mbarrier]. Stores have the two
  // sides swapped.
  const int shared = load ? 0 : 1, global = load ? 1 : 0, size = 2,
            barrier = detail->dimensions == 0 ? 3 : 2;
  b.step.slots = {b.address(shared, &detail->shared_offset),
                  b.address(global, &detail->global_offset),
                  load ? b.address(barrier, &detail->barrier_offset) : Slot{}};
  if (detail->dimensions == 0) {
    b.step.slots.push_back(b.source(size, kB32));
  } else {
    const ptx::Operand& map = b.operand(global);
    if (map.elements.size() != 1 ||
        static_cast<int>(map.elements[0].elements.size()) != detail->dimensions) {
      b.unsupported("the number of coordinates");
    }
    for (const ptx::Operand& coordinate : map.elements[0].elements)
      b.step.slots.push_back(b.source(coordinate, kB32));
  }
  b.step.run = load ? run_load : run_store;
}

}  // namespace emulator
