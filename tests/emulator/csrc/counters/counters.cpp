#include "counters/counters.h"

#include <algorithm>

#include "core/program.h"

namespace emulator {

namespace {

constexpr uint64_t kSectorBytes = 32;
constexpr uint32_t kBanks = 32;
constexpr uint32_t kBankBytes = 4;

// Sorts the first n and returns how many differ.
template <class T>
int sort_unique(T* values, int n) {
  std::sort(values, values + n);
  return static_cast<int>(std::unique(values, values + n) - values);
}

}  // namespace

Counters::Counters(const Program& program) : steps(program.steps.size()), opcodes(program.opcodes) {
  for (size_t i = 0; i < steps.size(); ++i) {
    steps[i].opcode = program.steps[i].opcode;
    steps[i].ptx_line = program.steps[i].source->at.ptx_line;
    steps[i].cuda_line = program.steps[i].source->at.cuda_line;
  }
}

void Counters::global_request(const Step& step, const uint64_t* addresses, LaneMask lanes,
                              int bytes) {
  if (lanes == 0) return;
  // A lane's bytes are aligned to their size, so 16 of them never straddle two sectors.
  uint64_t starts[kLanes], sectors[kLanes];
  int n = 0;
  for_each_lane(lanes, [&](int l) {
    starts[n] = addresses[l];
    sectors[n++] = addresses[l] / kSectorBytes;
  });
  const auto unique_bytes =
      static_cast<uint64_t>(sort_unique(starts, n)) * static_cast<uint64_t>(bytes);
  StepCounters& counters = steps[static_cast<size_t>(step.pc)];
  ++counters.requests;
  counters.sectors += static_cast<uint64_t>(sort_unique(sectors, n));
  counters.ideal_sectors += (unique_bytes + kSectorBytes - 1) / kSectorBytes;
}

// The hardware serves a request in groups of lanes that can take 128 bytes at most: all lanes at
// once up to 4 bytes each, halves at 8, quarters at 16. In a group, each bank gives one word a
// pass; lanes that want the same word share it.
void Counters::shared_request(const Step& step, const uint32_t* addresses, LaneMask lanes,
                              int bytes) {
  StepCounters& counters = steps[static_cast<size_t>(step.pc)];
  ++counters.shared_requests;
  const int group = bytes <= 4 ? kLanes : 128 / bytes;
  for (int first = 0; first < kLanes; first += group) {
    uint32_t words[kLanes * 4];
    int n = 0;
    const LaneMask mask = group == kLanes ? kAllLanes : (lane_bit(group) - 1) << first;
    for_each_lane(lanes & mask, [&](int l) {
      const uint32_t begin = addresses[l] / kBankBytes;
      const uint32_t end = (addresses[l] + static_cast<uint32_t>(bytes) - 1) / kBankBytes;
      for (uint32_t word = begin; word <= end; ++word) words[n++] = word;
    });
    if (n == 0) continue;
    n = sort_unique(words, n);
    uint32_t in_bank[kBanks] = {};
    uint32_t passes = 0;
    for (int i = 0; i < n; ++i) passes = std::max(passes, ++in_bank[words[i] % kBanks]);
    counters.wavefronts += passes;
    counters.ideal_wavefronts += (static_cast<uint32_t>(n) + kBanks - 1) / kBanks;
  }
}

}  // namespace emulator
