#include <algorithm>
#include <bitset>
#include <cstring>

#include "core/block.h"
#include "memory/shared_memory.h"
#include "tensor_core/multiply.h"
#include "tensor_core/wgmma.h"

namespace emulator {

namespace {

constexpr uint32_t kChunk = 16;

using Rows = std::bitset<kMaxColumns>;  // of A, or of Bᵀ

// Calls `visit(address, row, k)` for each 16-byte chunk of a matrix; the chunk's elements follow
// one another along K, or along the rows when it is MN-major.
template <class Visit>
void for_each_chunk(const MatrixDescriptor& matrix, bool mn_major, TensorFormat format,
                    uint32_t first_row, uint32_t rows, uint32_t k, Visit visit) {
  const auto bytes = static_cast<uint32_t>(bytes_of(format));
  const uint32_t row_step = mn_major ? kChunk / bytes : 1, k_step = mn_major ? 1 : kChunk / bytes;
  for (uint32_t row = 0; row < rows; row += row_step) {
    for (uint32_t i = 0; i < k; i += k_step) {
      visit(element_address(matrix, mn_major, bytes, first_row + row, i), row, i);
    }
  }
}

float decode_at(TensorFormat format, const uint8_t* bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, bytes, static_cast<size_t>(bytes_of(format)));
  switch (format) {
    case TensorFormat::F16:
      return operand_value<TensorFormat::F16>(bits);
    case TensorFormat::BF16:
      return operand_value<TensorFormat::BF16>(bits);
    default:
      return operand_value<TensorFormat::TF32>(bits);
  }
}

// Reads a matrix into values[row · row_stride + k · k_stride]; the result has the rows with
// something undefined. What lies outside shared memory was reported at issue and counts as zero.
Rows gather(SharedMemory& shared, const MatrixDescriptor& matrix, bool mn_major,
            TensorFormat format, uint32_t first_row, uint32_t rows, uint32_t k, float sign,
            float* values, uint32_t row_stride, uint32_t k_stride) {
  Rows undefined;
  const auto bytes = static_cast<uint32_t>(bytes_of(format));
  const uint32_t stride = mn_major ? row_stride : k_stride;
  for_each_chunk(matrix, mn_major, format, first_row, rows, k,
                 [&](uint32_t address, uint32_t row, uint32_t i) {
                   float* to = values + row * row_stride + i * k_stride;
                   if (!shared.inside(address, kChunk)) {
                     for (uint32_t e = 0; e < kChunk / bytes; ++e) to[e * stride] = 0;
                     return;
                   }
                   const uint8_t* from = shared.data(address);
                   for (uint32_t e = 0; e < kChunk / bytes; ++e) {
                     to[e * stride] = sign * decode_at(format, from + e * bytes);
                   }
                   const uint8_t* bad = shared.undefined(address);
                   for (uint32_t byte = 0; byte < kChunk; ++byte) {
                     if (bad[byte] != 0) undefined.set(row + (mn_major ? byte / bytes : 0));
                   }
                 });
  return undefined;
}

}  // namespace

Warpgroup& Warpgroup::of(Warp& warp) {
  if (!warp.wgmma_queue) {
    Block& block = warp.block();
    const int first = warp.index() / kWarpsOfGroup * kWarpsOfGroup;
    const auto group = std::make_shared<Warpgroup>(block, first);
    for (int w = first; w < std::min(first + kWarpsOfGroup, block.warps()); ++w) {
      block.warp(w).wgmma_queue = group;
    }
  }
  return *static_cast<Warpgroup*>(warp.wgmma_queue.get());
}

Warpgroup::Warpgroup(Block& block, int first_warp)
    : block_(block),
      warps_(std::min(kWarpsOfGroup, block.warps() - first_warp)),
      agent_(block.new_agent()) {
  for (int w = 0; w < warps_; ++w)
    members_[static_cast<size_t>(w)].warp = &block.warp(first_warp + w);
}

bool Warpgroup::issued_by_all(uint64_t end) {
  return std::all_of(members_.begin(), members_.begin() + warps_,
                     [end](const Member& m) { return m.issued >= end; });
}

// ---- issue
// ------------------------------------------------------------------------------------------

namespace {

// The value that all lanes must share.
uint64_t uniform(Warp& warp, const Step& step, const Slot& slot, const char* name) {
  const std::string use = std::string("is ") + name;
  warp.require_defined(step, slot, kAllLanes, use.c_str());
  const uint64_t value = warp.value(slot, 0);
  for (int l = 1; l < kLanes; ++l) {
    if (warp.value(slot, l) == value) continue;
    warp.report(Check::Convergence, step, l, std::string("the lanes disagree on ") + name);
    break;
  }
  return value;
}

bool uniform_predicate(Warp& warp, const Step& step, const Slot& slot) {
  warp.require_defined(step, slot, kAllLanes, "is scale-d");
  const LaneMask holds = warp.predicate(slot);
  if (holds != 0 && holds != kAllLanes) {
    warp.report(Check::Convergence, step, first_lane(holds), "the lanes disagree on scale-d");
  }
  return (holds & 1) != 0;
}

}  // namespace

void Warpgroup::issue(Warp& warp, const Step& step) {
  const auto& wgmma = static_cast<const Wgmma&>(*step.detail);
  const Slot* a = step.slots.data() + wgmma.registers();
  const int a_slots = wgmma.a_in_registers ? a_registers(bytes_of(wgmma.format), wgmma.k) : 1;
  const Slot* b = a + a_slots;
  const bool has_predicate = b + 1 != step.slots.data() + step.slots.size();
  const bool accumulate =
      has_predicate ? uniform_predicate(warp, step, b[1]) != wgmma.scale_d_negated : wgmma.scale_d;
  const uint64_t a_descriptor =
      wgmma.a_in_registers ? 0 : uniform(warp, step, a[0], "the descriptor of A");
  const uint64_t b_descriptor = uniform(warp, step, b[0], "the descriptor of B");
  if (warps_ < kWarpsOfGroup) {
    warp.report(Check::Convergence, step, 0,
                "the warpgroup has only " + std::to_string(warps_) + " of its 4 warps");
  }
  if (warp.wgmma_fence_serial == 0) {
    warp.report(Check::Asynchronous, step, 0, "wgmma.mma_async before the first wgmma.fence");
  }

  Member& mine = member(warp);
  if (mine.issued == first_ + operations_.size()) {
    operations_.emplace_back();
    Operation& made = operations_.back();
    made.step = &step;
    made.a = a_descriptor;
    made.b = b_descriptor;
    made.accumulate = accumulate;
  }
  Operation& operation = this->operation(mine.issued);
  if (operation.step != &step || operation.a != a_descriptor || operation.b != b_descriptor ||
      operation.accumulate != accumulate) {
    warp.report(
        Check::Convergence, step, 0,
        "the warps of a warpgroup disagree on an operation's instruction, descriptors or scale-d");
  }

  Part& part = operation.parts[static_cast<size_t>(warp.index() % kWarpsOfGroup)];
  part.issued = warp.serial();
  part.accumulate = accumulate;
  const uint32_t first_row = static_cast<uint32_t>(kTileRows * (warp.index() % kWarpsOfGroup));
  if (wgmma.a_in_registers) {
    for (int r = 0; r < a_slots; ++r) {
      if (warp.written(a[r]) <= warp.wgmma_fence_serial) continue;
      warp.report(
          Check::Asynchronous, step, 0,
          "register " + std::to_string(r) + " of A was modified after the last wgmma.fence");
      break;
    }
    part.a.resize(static_cast<size_t>(kTileRows * wgmma.k));
    const auto load = wgmma.format == TensorFormat::F16    ? load_a<TensorFormat::F16>
                      : wgmma.format == TensorFormat::BF16 ? load_a<TensorFormat::BF16>
                                                           : load_a<TensorFormat::TF32>;
    part.undefined_rows = load(warp, a, wgmma.k, part.a.data());
    for (float& value : part.a) value *= wgmma.a_sign;
  } else {
    announce(warp, step, MatrixDescriptor(a_descriptor), wgmma.a_mn_major, first_row, kTileRows,
             &operation.tickets);
  }
  announce(warp, step, MatrixDescriptor(b_descriptor), wgmma.b_mn_major, 0,
           static_cast<uint32_t>(wgmma.n), &operation.tickets);
  part.accumulator = &take_accumulator(mine, step, accumulate);

  ++mine.issued;
  if (++operation.issued < warps_) return;
  for (int w = 0; w < warps_; ++w) {
    Member& other = members_[static_cast<size_t>(w)];
    if (!other.waiting || !issued_by_all(other.target)) continue;
    other.waiting = false;
    complete(other, other.target);
    other.warp->resume(kAllLanes);
  }
}

Warpgroup::Accumulator& Warpgroup::take_accumulator(Member& member, const Step& step,
                                                    bool accumulate) {
  Warp& warp = *member.warp;
  const auto& wgmma = static_cast<const Wgmma&>(*step.detail);
  const Slot* d = step.slots.data();
  Accumulator& accumulator = member.accumulators[wgmma.accumulator];
  const bool same_shape = accumulator.step == nullptr ||
                          wgmma.same_shape(static_cast<const Wgmma&>(*accumulator.step->detail));
  if (accumulator.in_flight == 0) {
    for (int r = 0; r < wgmma.registers(); ++r) {
      const uint64_t written = warp.written(d[r]);
      if (written <= warp.wgmma_fence_serial) continue;
      if (same_shape && written == accumulator.stored) continue;
      warp.report(Check::Asynchronous, step, 0,
                  "register " + std::to_string(r) +
                      " of the accumulator was modified after the last wgmma.fence");
      break;
    }
    accumulator.issued = warp.serial();
    accumulator.values.assign(static_cast<size_t>(kTileRows * wgmma.n), 0.0f);
    accumulator.undefined.reset();
    if (accumulate) {
      const auto load =
          wgmma.half ? load_accumulator<true, kMaxColumns> : load_accumulator<false, kMaxColumns>;
      load(warp, d, wgmma.n, accumulator.values.data(), &accumulator.undefined);
    }
    for (int r = 0; r < wgmma.registers(); ++r) {
      for (int l = 0; l < kLanes; ++l) warp.set_undefined(d[r], l, ~uint64_t{0});
    }
  } else if (!same_shape && warp.wgmma_fence_serial <= accumulator.last_issued) {
    warp.report(Check::Asynchronous, step, 0,
                "the accumulator is in flight in a wgmma of another shape, and no wgmma.fence came "
                "between");
  }
  accumulator.step = &step;
  accumulator.last_issued = warp.serial();
  ++accumulator.in_flight;
  return accumulator;
}

// Checks the operand's bytes, and tells the race checks that they are being read from now on.
void Warpgroup::announce(Warp& warp, const Step& step, const MatrixDescriptor& matrix,
                         bool mn_major, uint32_t first_row, uint32_t rows,
                         std::vector<uint32_t>* tickets) {
  const auto& wgmma = static_cast<const Wgmma&>(*step.detail);
  SharedMemory& shared = block_.shared();
  std::vector<uint32_t> chunks;
  for_each_chunk(matrix, mn_major, wgmma.format, first_row, rows, static_cast<uint32_t>(wgmma.k),
                 [&](uint32_t address, uint32_t, uint32_t) { chunks.push_back(address); });
  std::sort(chunks.begin(), chunks.end());
  for (size_t i = 0; i < chunks.size();) {
    if (!shared.inside(chunks[i], kChunk)) {
      uint8_t value[kChunk], undefined[kChunk];
      shared.load_async(warp, step, 0, chunks[i], kChunk, value,
                        undefined);  // refuses, and says so
      ++i;
      continue;
    }
    const uint32_t begin = chunks[i];
    uint32_t end = begin;
    while (i < chunks.size() && chunks[i] <= end && shared.inside(chunks[i], kChunk))
      end = chunks[i++] + kChunk;
    if (!block_.settings().check_races) continue;
    SharedRaces::Access read{&warp, &step, 0, begin, end - begin, false};
    read.async_proxy = true;
    tickets->push_back(shared.races.begin(read));
  }
}

// ---- groups
// -----------------------------------------------------------------------------------------

void Warpgroup::commit(Warp& warp) {
  Member& mine = member(warp);
  mine.groups.push_back(mine.issued);
}

bool Warpgroup::wait(Warp& warp, size_t pending) {
  Member& mine = member(warp);
  mine.target = mine.waited;
  while (mine.groups.size() > pending) {
    mine.target = mine.groups.front();
    mine.groups.pop_front();
  }
  mine.waiting = !issued_by_all(mine.target);
  if (!mine.waiting) complete(mine, mine.target);
  return !mine.waiting;
}

void Warpgroup::execute(Operation& operation) {
  const Wgmma& wgmma = operation.wgmma();
  SharedMemory& shared = block_.shared();
  const auto n = static_cast<uint32_t>(wgmma.n), k = static_cast<uint32_t>(wgmma.k);
  std::vector<float> a(kTileRows * k), b(k * n);
  const Rows columns = gather(shared, MatrixDescriptor(operation.b), wgmma.b_mn_major, wgmma.format,
                              0, n, k, wgmma.b_sign, b.data(), 1, n);
  const Summation summation = summation_of(block_);
  for (int w = 0; w < warps_; ++w) {
    Part& part = operation.parts[static_cast<size_t>(w)];
    Accumulator& d = *part.accumulator;
    uint32_t rows = part.undefined_rows;
    if (!wgmma.a_in_registers) {
      const Rows undefined =
          gather(shared, MatrixDescriptor(operation.a), wgmma.a_mn_major, wgmma.format,
                 static_cast<uint32_t>(kTileRows * w), kTileRows, k, wgmma.a_sign, a.data(), k, 1);
      rows = static_cast<uint32_t>(undefined.to_ulong());
    }
    if (!part.accumulate) {
      std::fill(d.values.begin(), d.values.end(), 0.0f);
      d.undefined.reset();
    }
    multiply(wgmma.format, wgmma.half, summation, wgmma.a_in_registers ? part.a.data() : a.data(),
             b.data(), d.values.data(), wgmma.n, wgmma.k);
    if (rows != 0 || columns.any()) {
      const auto whole = [&columns](int column) { return columns[static_cast<size_t>(column)]; };
      spread_undefined<kMaxColumns>(rows, whole, wgmma.n, &d.undefined);
    }
  }
  operation.epoch = block_.advance(agent_);
  for (const uint32_t ticket : operation.tickets)
    shared.races.end_by_agent(agent_, operation.epoch, ticket);
}

// The warp knows that its operations before `end` are done.
void Warpgroup::complete(Member& member, uint64_t end) {
  if (member.waited == end) return;
  while (executed_ < end) execute(operation(executed_++));
  const auto part = static_cast<size_t>(member.warp->index() % kWarpsOfGroup);
  for (; member.waited < end; ++member.waited) {
    Operation& done = operation(member.waited);
    finish(member, done, done.parts[part]);
  }
  Block::learn(*member.warp, kAllLanes, agent_, operation(end - 1).epoch);
  const auto slowest =
      std::min_element(members_.begin(), members_.begin() + warps_,
                       [](const Member& a, const Member& b) { return a.waited < b.waited; });
  while (first_ < slowest->waited) {
    operations_.pop_front();
    ++first_;
  }
}

void Warpgroup::finish(Member& member, const Operation& operation, Part& part) {
  Warp& warp = *member.warp;
  const Step& step = *operation.step;
  const Wgmma& wgmma = operation.wgmma();
  const auto check_untouched = [&](const Slot* slots, int count, uint64_t since, const char* what) {
    for (int r = 0; r < count; ++r) {
      if (warp.written(slots[r]) <= since) continue;
      warp.report(Check::Asynchronous, step, 0,
                  "register " + std::to_string(r) + " of " + what +
                      " was modified before a wgmma.wait_group covered the operation");
      return;
    }
  };
  if (wgmma.a_in_registers) {
    check_untouched(step.slots.data() + wgmma.registers(),
                    a_registers(bytes_of(wgmma.format), wgmma.k), part.issued, "A");
  }
  Accumulator& d = *part.accumulator;
  if (--d.in_flight != 0) return;
  check_untouched(step.slots.data(), wgmma.registers(), d.issued, "the accumulator");
  const auto store =
      wgmma.half ? store_accumulator<true, kMaxColumns> : store_accumulator<false, kMaxColumns>;
  store(warp, step.slots.data(), wgmma.n, d.values.data(), d.undefined);
  d.stored = warp.serial();
}

}  // namespace emulator
