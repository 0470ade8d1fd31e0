#include "memory/global_access.h"

#include <cstring>

#include "core/launch.h"
#include "memory/allocation.h"

namespace emulator {

namespace {

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

struct Place {
  Allocation* allocation = nullptr;
  Page* page = nullptr;
  uint64_t offset = 0;  // in the allocation
  uint64_t within = 0;  // the page
};

// Any of the bytes' flags, together.
uint8_t flags_of(const Page& page, uint64_t within, int bytes) {
  uint8_t flags = 0;
  for (int i = 0; i < bytes; ++i) flags |= page.flags[within + static_cast<uint64_t>(i)];
  return flags;
}

void report_outside(Warp& warp, const Step& step, int lane, uint64_t address,
                    const std::string& what) {
  const Allocation* nearest = warp.block().launch().machine.memory.nearest(address);
  if (nearest == nullptr) {
    warp.report(Check::OutOfBounds, step, lane,
                what + " at " + hex(address) + ": no buffer is there");
    return;
  }
  const auto offset = static_cast<int64_t>(address - nearest->address);
  warp.report(Check::OutOfBounds, step, lane,
              what + " at byte " + std::to_string(offset) + " of `" + nearest->name + "` (" +
                  std::to_string(nearest->bytes) + " bytes" +
                  (offset >= 0 && static_cast<uint64_t>(offset) < nearest->bytes
                       ? "; outside the view that was passed)"
                       : ")"),
              nearest->name, offset);
}

bool locate(Warp& warp, const Step& step, int lane, uint64_t address, int bytes, const char* verb,
            Place* place) {
  DeviceMemory& memory = warp.block().launch().machine.memory;
  const auto what = [&] { return std::string(verb) + " " + std::to_string(bytes) + " bytes"; };
  if (address % static_cast<uint64_t>(bytes) != 0) {
    const Allocation* nearest = memory.nearest(address);
    warp.report(
        Check::Misaligned, step, lane,
        what() + " at " + hex(address) + ", which is not a multiple of " + std::to_string(bytes),
        nearest == nullptr ? "" : nearest->name,
        nearest == nullptr ? 0 : static_cast<int64_t>(address - nearest->address));
    return false;
  }
  place->allocation = memory.find(address);
  if (place->allocation == nullptr ||
      !place->allocation->inside(address, static_cast<uint64_t>(bytes))) {
    report_outside(warp, step, lane, address, what());
    return false;
  }
  const uint64_t offset = address - place->allocation->address;
  place->offset = offset;
  place->page = &place->allocation->page(offset);
  place->within = place->allocation->within_page(offset);
  if ((flags_of(*place->page, place->within, bytes) & Page::kInaccessible) != 0) {
    report_outside(warp, step, lane, address, what());
    return false;
  }
  return true;
}

void trace(Warp& warp, const Step& step, int lane, const Place& place, int bytes, bool write,
           bool strong, bool same_value) {
  Launch& launch = warp.block().launch();
  Page::Trace& trace = place.page->trace_of(launch.id);
  place.allocation->count(launch.id, static_cast<uint64_t>(bytes), write);
  auto& touched = write ? trace.written : trace.read;
  const uint64_t mask = bytes >= 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
  touched[place.within / 64] |= mask << (place.within % 64);
  if (place.within % 64 + static_cast<uint64_t>(bytes) > 64) {
    touched[place.within / 64 + 1] |= mask >> (64 - place.within % 64);
  }
  if (!launch.machine.settings.check_races) return;
  GlobalRaces::Other other{};
  if (launch.races.access(trace, warp, lane, place.within, bytes, write, strong, same_value,
                          &other))
    return;
  const bool same_block = other.block == warp.block().index();
  warp.report(Check::Race, step, lane,
              std::string(write ? "writes `" : "reads `") + place.allocation->name + "`, which " +
                  (same_block ? "thread " + std::to_string(other.agent) + " of the same block"
                              : "block " + std::to_string(other.block) + " thread " +
                                    std::to_string(other.agent)) +
                  (other.write ? " wrote" : " read") + ": nothing orders them",
              place.allocation->name, static_cast<int64_t>(place.offset));
}

}  // namespace

bool load_global(Warp& warp, const Step& step, int lane, uint64_t address, int bytes,
                 const Ordering& ordering, void* value, uint8_t* undefined) {
  Place place;
  if (!locate(warp, step, lane, address, bytes, "reads", &place)) {
    std::memset(value, 0, static_cast<size_t>(bytes));
    std::memset(undefined, 0, static_cast<size_t>(bytes));
    return false;
  }
  if (ordering.strong) warp.block().launch().races.observe(address, warp, lane, ordering);
  trace(warp, step, lane, place, bytes, false, ordering.strong, false);
  std::memcpy(value, place.page->data.data() + place.within, static_cast<size_t>(bytes));
  for (int i = 0; i < bytes; ++i) {
    undefined[i] =
        (place.page->flags[place.within + static_cast<uint64_t>(i)] & Page::kUndefined) != 0 ? 0xff
                                                                                             : 0;
  }
  return true;
}

bool store_global(Warp& warp, const Step& step, int lane, uint64_t address, int bytes,
                  const Ordering& ordering, const void* value, const uint8_t* undefined) {
  Place place;
  if (!locate(warp, step, lane, address, bytes, "writes", &place)) return false;
  uint8_t* data = place.page->data.data() + place.within;
  const bool same = std::memcmp(data, value, static_cast<size_t>(bytes)) == 0;
  trace(warp, step, lane, place, bytes, true, ordering.strong, same);
  if (ordering.strong) warp.block().launch().races.publish(address, warp, lane, ordering);
  if (!same) warp.block().changed();
  std::memcpy(data, value, static_cast<size_t>(bytes));
  for (int i = 0; i < bytes; ++i) {
    uint8_t& flag = place.page->flags[place.within + static_cast<uint64_t>(i)];
    if (undefined[i] != 0) {
      warp.report(Check::Uninitialised, step, lane,
                  "stores an undefined value to `" + place.allocation->name + "`",
                  place.allocation->name, static_cast<int64_t>(place.offset));
      flag |= Page::kUndefined;
    } else {
      flag &= static_cast<uint8_t>(~Page::kUndefined);
    }
  }
  return true;
}

bool is_accessible(Warp& warp, uint64_t address, int bytes) {
  Allocation* allocation = warp.block().launch().machine.memory.find(address);
  if (allocation == nullptr || !allocation->inside(address, static_cast<uint64_t>(bytes)))
    return false;
  const uint64_t offset = address - allocation->address;
  const Page& page = allocation->page(offset);
  const uint64_t within = allocation->within_page(offset);
  return within + static_cast<uint64_t>(bytes) <= kPageBytes &&
         (flags_of(page, within, bytes) & Page::kInaccessible) == 0;
}

}  // namespace emulator
