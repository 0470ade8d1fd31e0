#include "memory/device_memory.h"

#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "core/address_space.h"
#include "memory/allocation.h"

namespace emulator {

namespace {

// Far enough apart that a wild index of one buffer does not land in another.
constexpr uint64_t kGuardBytes = uint64_t{1} << 24;

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// Marks as accessible the bytes of `view` (dimensions from `dim` on, starting at `start`) that lie
// within [first, last); whole rows that lie outside are skipped.
void mark_view(const View& view, size_t dim, int64_t start, int64_t first, int64_t last,
               uint8_t* flags) {
  int64_t low = start, high = start + view.element_bytes;
  for (size_t i = dim; i < view.shape.size(); ++i) {
    if (view.shape[i] == 0) return;
    const int64_t reach = (view.shape[i] - 1) * view.strides[i];
    (reach < 0 ? low : high) += reach;
  }
  if (high <= first || low >= last) return;
  if (dim == view.shape.size()) {
    for (int64_t at = std::max(low, first); at < std::min(high, last); ++at) {
      flags[at - first] &= static_cast<uint8_t>(~Page::kInaccessible);
    }
    return;
  }
  int64_t begin = 0, end = view.shape[dim];
  const int64_t stride = view.strides[dim];
  if (stride > 0) {
    // Only the indices whose rows can reach into the page.
    const int64_t low_rest = low - start;
    const int64_t high_rest = high - start - (end - 1) * stride;
    begin = std::max<int64_t>(begin, (first - high_rest - start) / stride);
    end = std::min<int64_t>(end, (last - low_rest - start) / stride + 1);
  }
  for (int64_t i = begin; i < end; ++i) {
    mark_view(view, dim + 1, start + i * stride, first, last, flags);
  }
}

}  // namespace

Page::Trace& Page::trace_of(int launch) {
  if (!trace) trace = std::make_unique<Trace>();
  if (trace->launch != launch) {
    trace->launch = launch;
    trace->writer.fill(0);
    trace->readers.fill({0, 0});
    trace->read.fill(0);
    trace->written.fill(0);
  }
  return *trace;
}

std::unique_ptr<Page> Allocation::make_page(uint64_t index) const {
  auto page = std::make_unique<Page>();
  page->flags.fill(Page::kUndefined);
  apply_view(index, page.get());
  return page;
}

void Allocation::apply_view(uint64_t index, Page* page) const {
  const int64_t first = static_cast<int64_t>(index * kPageBytes) - static_cast<int64_t>(skew_);
  const int64_t last = first + static_cast<int64_t>(kPageBytes);
  for (uint8_t& flag : page->flags) flag |= Page::kInaccessible;
  if (restricted_) {
    mark_view(view_, 0, view_.offset, first, last, page->flags.data());
  } else {
    const int64_t end = std::min(last, static_cast<int64_t>(bytes));
    for (int64_t at = std::max<int64_t>(first, 0); at < end; ++at) {
      page->flags[static_cast<size_t>(at - first)] &= static_cast<uint8_t>(~Page::kInaccessible);
    }
  }
}

void Allocation::restrict(const View& view) {
  restricted_ = true;
  view_ = view;
  for (uint64_t i = 0; i < pages_.size(); ++i) {
    if (pages_[i]) apply_view(i, pages_[i].get());
  }
}

void Allocation::count(int current, uint64_t count, bool write) {
  if (launch != current) {
    launch = current;
    bytes_read = bytes_written = 0;
  }
  (write ? bytes_written : bytes_read) += count;
}

DeviceMemory::DeviceMemory() : next_(kGlobalBase) {}
DeviceMemory::~DeviceMemory() = default;

uint64_t DeviceMemory::allocate(uint64_t bytes, const std::string& name, uint64_t skew) {
  if (bytes > uint64_t{1} << 44)
    throw ArgumentError("allocate: " + std::to_string(bytes) + " bytes is too much");
  const uint64_t address = next_ + skew;
  next_ = (address + bytes + kGuardBytes + kAllocationAlignment - 1) / kAllocationAlignment *
          kAllocationAlignment;
  allocations_[address] = std::make_unique<Allocation>(address, bytes, name);
  return address;
}

void DeviceMemory::free(uint64_t address) {
  const auto found = allocations_.find(address);
  if (found == allocations_.end())
    throw ArgumentError("free: no allocation starts at " + hex(address));
  if (last_ == found->second.get()) last_ = nullptr;
  allocations_.erase(found);
}

void DeviceMemory::rename(uint64_t address, const std::string& name) {
  const auto found = allocations_.find(address);
  if (found == allocations_.end())
    throw ArgumentError("rename: no allocation starts at " + hex(address));
  found->second->name = name;
}

void DeviceMemory::restrict(uint64_t address, const View& view) {
  const auto found = allocations_.find(address);
  if (found == allocations_.end())
    throw ArgumentError("restrict: no allocation starts at " + hex(address));
  if (view.shape.size() != view.strides.size())
    throw ArgumentError("restrict: shape and strides differ in length");
  int64_t low = view.offset, high = view.offset + view.element_bytes;
  bool empty = false;
  for (size_t i = 0; i < view.shape.size(); ++i) {
    if (view.shape[i] < 0) throw ArgumentError("restrict: a negative size");
    if (view.shape[i] == 0) empty = true;
    const int64_t reach = (view.shape[i] - 1) * view.strides[i];
    (reach < 0 ? low : high) += reach;
  }
  if (!empty && (low < 0 || static_cast<uint64_t>(high) > found->second->bytes)) {
    throw ArgumentError("restrict: the view covers bytes " + std::to_string(low) + " to " +
                        std::to_string(high) + " of an allocation of " +
                        std::to_string(found->second->bytes));
  }
  found->second->restrict(view);
}

Allocation* DeviceMemory::find(uint64_t address) const {
  if (last_ != nullptr && address - last_->address < last_->bytes) return last_;
  auto after = allocations_.upper_bound(address);
  if (after == allocations_.begin()) return nullptr;
  Allocation* candidate = std::prev(after)->second.get();
  if (address - candidate->address >= candidate->bytes) return nullptr;
  last_ = candidate;
  return candidate;
}

Allocation* DeviceMemory::nearest(uint64_t address) const {
  auto after = allocations_.upper_bound(address);
  Allocation* right = after == allocations_.end() ? nullptr : after->second.get();
  Allocation* left = after == allocations_.begin() ? nullptr : std::prev(after)->second.get();
  if (left == nullptr || right == nullptr) return left == nullptr ? right : left;
  const uint64_t past =
      address - left->address < left->bytes ? 0 : address - left->address - left->bytes;
  return past <= right->address - address ? left : right;
}

std::vector<Allocation*> DeviceMemory::allocations() const {
  std::vector<Allocation*> all;
  for (const auto& [address, allocation] : allocations_) all.push_back(allocation.get());
  return all;
}

namespace {

// Calls `visit(page, offset in the page, bytes, bytes done before)` over a range of an allocation.
template <class Visit>
void for_each_piece(Allocation& allocation, uint64_t address, uint64_t bytes, Visit visit) {
  uint64_t offset = address - allocation.address, done = 0;
  while (done < bytes) {
    const uint64_t within = allocation.within_page(offset);
    const uint64_t piece = std::min(bytes - done, kPageBytes - within);
    visit(allocation.page(offset), within, piece, done);
    offset += piece;
    done += piece;
  }
}

}  // namespace

bool DeviceMemory::contains(uint64_t address, uint64_t bytes) const {
  if (bytes == 0) return true;
  const Allocation* allocation = find(address);
  return allocation != nullptr && allocation->inside(address, bytes);
}

static Allocation& holder(const DeviceMemory& memory, uint64_t address, uint64_t bytes,
                          const char* what) {
  if (!memory.contains(address, bytes)) {
    throw ArgumentError(std::string(what) + ": " + std::to_string(bytes) + " bytes at " +
                        hex(address) + " are not inside one allocation");
  }
  return *memory.find(address);
}

void DeviceMemory::write(uint64_t address, const void* source, uint64_t bytes) {
  if (bytes == 0) return;
  for_each_piece(holder(*this, address, bytes, "write"), address, bytes,
                 [&](Page& page, uint64_t at, uint64_t n, uint64_t done) {
                   std::memcpy(page.data.data() + at, static_cast<const uint8_t*>(source) + done,
                               n);
                   for (uint64_t i = at; i < at + n; ++i)
                     page.flags[i] &= static_cast<uint8_t>(~Page::kUndefined);
                 });
}

void DeviceMemory::read(uint64_t address, void* destination, uint64_t bytes) {
  if (bytes == 0) return;
  for_each_piece(holder(*this, address, bytes, "read"), address, bytes,
                 [&](Page& page, uint64_t at, uint64_t n, uint64_t done) {
                   std::memcpy(static_cast<uint8_t*>(destination) + done, page.data.data() + at, n);
                 });
}

void DeviceMemory::fill(uint64_t address, uint8_t value, uint64_t bytes) {
  if (bytes == 0) return;
  for_each_piece(holder(*this, address, bytes, "fill"), address, bytes,
                 [&](Page& page, uint64_t at, uint64_t n, uint64_t) {
                   std::memset(page.data.data() + at, value, n);
                   for (uint64_t i = at; i < at + n; ++i)
                     page.flags[i] &= static_cast<uint8_t>(~Page::kUndefined);
                 });
}

void DeviceMemory::copy(uint64_t destination, uint64_t source, uint64_t bytes) {
  if (bytes == 0) return;
  holder(*this, source, bytes, "copy");
  holder(*this, destination, bytes, "copy");
  std::vector<uint8_t> data(bytes), undefined(bytes);
  read(source, data.data(), bytes);
  read_undefined(source, undefined.data(), bytes);
  write(destination, data.data(), bytes);
  for_each_piece(*find(destination), destination, bytes,
                 [&](Page& page, uint64_t at, uint64_t n, uint64_t done) {
                   for (uint64_t i = 0; i < n; ++i) {
                     if (undefined[done + i] != 0) page.flags[at + i] |= Page::kUndefined;
                   }
                 });
}

void DeviceMemory::set_undefined(uint64_t address, uint64_t bytes) {
  if (bytes == 0) return;
  for_each_piece(holder(*this, address, bytes, "set_undefined"), address, bytes,
                 [&](Page& page, uint64_t at, uint64_t n, uint64_t) {
                   for (uint64_t i = at; i < at + n; ++i) page.flags[i] |= Page::kUndefined;
                 });
}

void DeviceMemory::read_undefined(uint64_t address, uint8_t* destination, uint64_t bytes) {
  if (bytes == 0) return;
  for_each_piece(holder(*this, address, bytes, "read_undefined"), address, bytes,
                 [&](Page& page, uint64_t at, uint64_t n, uint64_t done) {
                   for (uint64_t i = 0; i < n; ++i) {
                     destination[done + i] =
                         (page.flags[at + i] & Page::kUndefined) != 0 ? 0xff : 0;
                   }
                 });
}

}  // namespace emulator
