// A warp's 32 lanes, and sets of them as bit masks.
#pragma once

#include <cstdint>

namespace emulator {

constexpr int kLanes = 32;

// Bit i stands for lane i.
using LaneMask = uint32_t;
constexpr LaneMask kAllLanes = ~LaneMask{0};

inline LaneMask lane_bit(int lane) {
  return LaneMask{1} << lane;
}
inline int count(LaneMask lanes) {
  return __builtin_popcount(lanes);
}
inline int first_lane(LaneMask lanes) {
  return __builtin_ctz(lanes);
}

// Calls `visit(lane)` for each lane of the set, from the lowest up.
template <class Visit>
inline void for_each_lane(LaneMask lanes, Visit visit) {
  while (lanes != 0) {
    visit(first_lane(lanes));
    lanes &= lanes - 1;
  }
}

}  // namespace emulator
