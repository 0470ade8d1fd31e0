// One launch: the grid of blocks, the order they run in, and what they share.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
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
  // Whether this check has found something at this line before; then it counts once more.
  bool repeats(Check check, int ptx_line);
  int threads() const { return static_cast<int>(shape.block[0] * shape.block[1] * shape.block[2]); }

 private:
  int blocks_at_once() const;

  std::map<std::pair<Check, int>, size_t> seen_;  // (check, PTX line) to the finding's index
};

}  // namespace emulator
