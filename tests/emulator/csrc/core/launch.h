// One launch: the grid of blocks, the order they run in, and what they share.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/block.h"
#include "races/global_races.h"
#include "runtime/machine.h"

namespace emulator {

// Ends a launch at once: what made it end is among the findings.
struct LaunchEnd : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Launch {
 public:
  Launch(Machine& machine, const Program& program, const LaunchShape& shape, const void* parameters,
         LaunchRecord* record);
  ~Launch();

  void run();

  Machine& machine;
  const Program& program;
  const LaunchShape& shape;
  LaunchRecord& record;
  std::vector<uint8_t> parameters;
  GlobalRaces races;
  int id;  // tells this launch's page stamps from earlier ones'

  void report(Finding finding);
  int threads() const { return static_cast<int>(shape.block[0] * shape.block[1] * shape.block[2]); }

 private:
  int blocks_at_once() const;

  std::unordered_map<uint64_t, size_t> seen_;  // (check, pc) to the finding's index
};

}  // namespace emulator
