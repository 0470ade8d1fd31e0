// mbarrier objects: arrivals, transactions, phases (PTX ISA 9.7.13.15, "mbarrier").
#pragma once

#include <cstdint>

#include "async/async_state.h"
#include "core/block.h"
#include "core/warp.h"

namespace emulator {

// The mbarrier at a shared address; nullptr, and a finding, where none was initialised.
MBarrier* find_mbarrier(Warp& warp, const Step& step, int lane, uint32_t address);

// `count` arrivals, with what was released put into `gathering` before. Completes the phase when it
// can.
void arrive_on(Warp& warp, const Step& step, int lane, MBarrier& barrier, uint32_t count);
// Bytes of bulk copies that were announced (positive) or have landed (negative).
void change_transactions(Block& block, MBarrier& barrier, int64_t bytes);
// "The bulk copy of this lane may signal it": its initialisation was fenced for the async proxy.
void require_initialised_for_proxy(Warp& warp, const Step& step, int lane, const MBarrier& barrier);

}  // namespace emulator
