// One allocation of global memory: pages that come to be when they are touched.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "memory/device_memory.h"

namespace emulator {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kAllocationAlignment = 256;

struct Page {
  static constexpr uint8_t kUndefined = 1;
  static constexpr uint8_t kInaccessible = 2;

  std::array<uint8_t, kPageBytes> data{};
  std::array<uint8_t, kPageBytes> flags{};

  // Who touched a pair of bytes in the current launch (races/global_races.h), and which bytes were
  // read and written in it; made at the first access by a kernel.
  struct Trace {
    int launch = -1;
    std::array<uint64_t, kPageBytes / 2> writer;
    std::array<std::array<uint64_t, 2>, kPageBytes / 2> readers;
    std::array<uint64_t, kPageBytes / 64> read, written;  // a bit for each byte
  };
  std::unique_ptr<Trace> trace;
  Trace& trace_of(int launch);
};

class Allocation {
 public:
  Allocation(uint64_t address, uint64_t bytes, std::string name)
      : address(address),
        bytes(bytes),
        name(std::move(name)),
        skew_(address % kAllocationAlignment),
        pages_((skew_ + bytes + kPageBytes - 1) / kPageBytes) {}

  const uint64_t address;
  const uint64_t bytes;
  std::string name;
  // Of the current launch.
  int launch = -1;
  uint64_t bytes_read = 0, bytes_written = 0;

  bool inside(uint64_t at, uint64_t count) const {
    return at >= address && at - address <= bytes && count <= bytes - (at - address);
  }
  // The page that holds byte `offset` of the allocation.
  Page& page(uint64_t offset) {
    const uint64_t index = (skew_ + offset) / kPageBytes;
    std::unique_ptr<Page>& page = pages_[index];
    if (!page) page = make_page(index);
    return *page;
  }
  // Where in its page that byte lies.
  uint64_t within_page(uint64_t offset) const { return (skew_ + offset) % kPageBytes; }
  Page* page_if_touched(uint64_t index) const { return pages_[index].get(); }
  uint64_t pages() const { return pages_.size(); }
  void restrict(const View& view);
  void count(int launch, uint64_t bytes, bool write);

 private:
  std::unique_ptr<Page> make_page(uint64_t index) const;
  void apply_view(uint64_t index, Page* page) const;

  // Of a view that starts in the middle of its storage: pages start where the storage is aligned,
  // so that no aligned access straddles two of them.
  uint64_t skew_;
  std::vector<std::unique_ptr<Page>> pages_;
  bool restricted_ = false;
  View view_;
};

}  // namespace emulator
