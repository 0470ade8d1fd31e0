// Global memory: allocations that are as sparse as what is touched, each restricted to the view of
// it that a kernel may see.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

// A strided view: the elements that a kernel may touch. Strides and `offset` in bytes; strides may
// be zero or negative. Everything else of the allocation, gaps included, is out of bounds.
struct View {
  int64_t offset = 0;
  int element_bytes = 1;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

class Allocation;

class DeviceMemory {
 public:
  DeviceMemory();
  ~DeviceMemory();

  // Reserves addresses; memory is committed page by page when touched. The start is a multiple of
  // 256 (as cudaMalloc promises) plus `skew`. Wholly accessible and undefined until said otherwise.
  uint64_t allocate(uint64_t bytes, const std::string& name, uint64_t skew = 0);
  // ArgumentError where no allocation starts here.
  void free(uint64_t address);
  void rename(uint64_t address, const std::string& name);
  void restrict(uint64_t address, const View& view);

  // The host's copies: what is written becomes defined. ArgumentError where the range is not inside
  // one allocation.
  void write(uint64_t address, const void* source, uint64_t bytes);
  void read(uint64_t address, void* destination, uint64_t bytes);
  void fill(uint64_t address, uint8_t value, uint64_t bytes);
  void copy(uint64_t destination, uint64_t source, uint64_t bytes);  // validity goes along
  void set_undefined(uint64_t address, uint64_t bytes);
  // One byte of 0xff for each undefined byte.
  void read_undefined(uint64_t address, uint8_t* destination, uint64_t bytes);
  bool contains(uint64_t address, uint64_t bytes) const;

  // The allocation that holds the address, or the nearest one, for reports; nullptr when there is
  // none.
  Allocation* find(uint64_t address) const;
  Allocation* nearest(uint64_t address) const;
  std::vector<Allocation*> allocations() const;

 private:
  std::map<uint64_t, std::unique_ptr<Allocation>> allocations_;  // by start
  uint64_t next_;
  mutable Allocation* last_ = nullptr;
};

}  // namespace emulator
