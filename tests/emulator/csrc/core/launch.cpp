#include "core/launch.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "common/error.h"
#include "memory/allocation.h"
#include "runtime/limits.h"

namespace emulator {

namespace {

// Rounds in which all resident blocks spin and nothing changes before that is called a deadlock: a
// thread may count its polls and give up.
constexpr int kIdleRounds = 300;

int next_launch_id() {
  static int id = 0;
  return ++id;
}

}  // namespace

Launch::Launch(Machine& machine, const Program& program, const LaunchShape& shape,
               const void* parameters, LaunchRecord* record)
    : machine(machine),
      program(program),
      shape(shape),
      record(*record),
      parameters(static_cast<const uint8_t*>(parameters),
                 static_cast<const uint8_t*>(parameters) + program.parameter_bytes),
      id(next_launch_id()) {
  record->kernel = program.name;
  record->shape = shape;
  record->counters = Counters(program);
}

Launch::~Launch() {
  // The buffers' totals: what was touched, each byte once.
  for (Allocation* allocation : machine.memory.allocations()) {
    if (allocation->launch != id) continue;
    BufferCounters counters;
    counters.name = allocation->name;
    counters.bytes_read = allocation->bytes_read;
    counters.bytes_written = allocation->bytes_written;
    for (uint64_t i = 0; i < allocation->pages(); ++i) {
      const Page* page = allocation->page_if_touched(i);
      if (page == nullptr || !page->trace || page->trace->launch != id) continue;
      for (const uint64_t bits : page->trace->read)
        counters.unique_read += static_cast<uint64_t>(__builtin_popcountll(bits));
      for (const uint64_t bits : page->trace->written) {
        counters.unique_written += static_cast<uint64_t>(__builtin_popcountll(bits));
      }
    }
    record.counters.buffers.push_back(counters);
  }
}

// As many as the device holds at once: blocks that wait for one that does not fit yet wait forever
// there too.
int Launch::blocks_at_once() const {
  KernelResources kernel;
  kernel.registers = program.registers;
  kernel.static_shared_bytes = program.dynamic_shared_offset;
  const int blocks = resident_blocks(machine.limits, kernel, threads(), shape.dynamic_shared_bytes);
  return std::max(blocks, 1) * machine.limits.multiprocessors;
}

void Launch::run() {
  const auto total = static_cast<size_t>(shape.grid[0]) * shape.grid[1] * shape.grid[2];
  std::vector<int> order(total);
  std::iota(order.begin(), order.end(), 0);
  if (machine.settings.order == Order::Reverse) std::reverse(order.begin(), order.end());
  if (machine.settings.order == Order::Random) {
    std::mt19937_64 generator(machine.settings.seed);
    std::shuffle(order.begin(), order.end(), generator);
  }
  const auto limit = static_cast<size_t>(blocks_at_once());
  std::vector<std::unique_ptr<Block>> resident;
  size_t started = 0;
  int idle = 0;
  while (started < total || !resident.empty()) {
    bool moved = false;
    for (size_t i = 0; i < resident.size();) {
      Block& block = *resident[i];
      const uint64_t before = block.changes();
      const Block::Outcome outcome = block.run();
      moved = moved || outcome == Block::Outcome::Finished || block.changes() != before;
      if (outcome == Block::Outcome::Stuck) {
        block.report_stuck("deadlock: nothing can wake these lanes");
        throw LaunchEnd("deadlock");
      }
      if (outcome == Block::Outcome::Finished) {
        resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
    if (moved) {
      idle = 0;
      continue;
    }
    if (started < total && resident.size() < limit) {
      resident.push_back(std::make_unique<Block>(*this, order[started++]));
      idle = 0;
    } else if (++idle > kIdleRounds) {
      for (const auto& block : resident) {
        block->report_stuck(
            "deadlock: every block spins, and none of them will change what another waits for");
      }
      throw LaunchEnd("deadlock");
    }
  }
}

bool Launch::repeats(Check check, int ptx_line) {
  const auto found = seen_.find({check, ptx_line});
  if (found == seen_.end()) return false;
  ++record.findings[found->second].count;
  return true;
}

void Launch::report(Finding finding) {
  if (repeats(finding.check, finding.ptx_line)) return;
  seen_[{finding.check, finding.ptx_line}] = record.findings.size();
  record.findings.push_back(std::move(finding));
}

}  // namespace emulator
