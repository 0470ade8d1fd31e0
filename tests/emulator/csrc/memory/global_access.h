// A lane's access to global memory, checked: bounds of the view, alignment, validity, and races.
#pragma once

#include <cstdint>

#include "core/warp.h"
#include "races/global_races.h"

namespace emulator {

// `undefined` has 0xff for every undefined byte. False: nothing was done, a finding was recorded,
// and a load's value is zero and defined. At most 32 bytes, aligned to their number.
bool load_global(Warp& warp, const Step& step, int lane, uint64_t address, int bytes,
                 const Ordering& ordering, void* value, uint8_t* undefined);
// Storing undefined bytes is a finding.
bool store_global(Warp& warp, const Step& step, int lane, uint64_t address, int bytes,
                  const Ordering& ordering, const void* value, const uint8_t* undefined);
// Whether the bytes are accessible, without touching or reporting (tensor copies fill the rest by
// zeros).
bool is_accessible(Warp& warp, uint64_t address, int bytes);

}  // namespace emulator
