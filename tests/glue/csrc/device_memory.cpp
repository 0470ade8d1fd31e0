#include "device_memory.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

// tests/emulator/csrc/python/machine_api.cpp
extern "C" {
uint64_t emulator_allocate(uint64_t bytes, const char* name, uint64_t skew);
int emulator_free(uint64_t address);
int emulator_restrict(uint64_t address, int64_t offset, int element_bytes, int dimensions,
                      const int64_t* shape, const int64_t* strides);
int emulator_write(uint64_t address, const void* source, uint64_t bytes);
int emulator_read(uint64_t address, void* destination, uint64_t bytes);
int emulator_read_undefined(uint64_t address, uint8_t* destination, uint64_t bytes);
const char* emulator_last_error();
}

namespace fused_lora::glue {
namespace {

void check(bool succeeded) {
  if (!succeeded) throw std::runtime_error(std::string("emulator: ") + emulator_last_error());
}

void* pointer(uint64_t address) {
  return reinterpret_cast<void*>(address);
}

// From a view's first element to its last.
int64_t bytes_of(const kernels::MatrixView& view, int64_t rows, int64_t columns,
                 int64_t element_bytes) {
  return ((rows - 1) * view.row_stride + (columns - 1) * view.column_stride + 1) * element_bytes;
}

}  // namespace

DeviceMemory::~DeviceMemory() {
  for (const uint64_t address : allocations_) emulator_free(address);
}

// Aligned as the host's memory is.
uint64_t DeviceMemory::allocate(const char* name, int64_t bytes, const void* host) {
  const uint64_t skew = reinterpret_cast<uintptr_t>(host) % 256;
  const uint64_t address = emulator_allocate(static_cast<uint64_t>(bytes), name, skew);
  check(address != 0);
  allocations_.push_back(address);
  return address;
}

uint64_t DeviceMemory::allocate(const char* name, const kernels::MatrixView& host, int64_t rows,
                                int64_t columns, int64_t element_bytes) {
  const uint64_t address = allocate(name, bytes_of(host, rows, columns, element_bytes), host.data);
  const int64_t shape[2] = {rows, columns};
  const int64_t strides[2] = {host.row_stride * element_bytes, host.column_stride * element_bytes};
  check(emulator_restrict(address, 0, static_cast<int>(element_bytes), 2, shape, strides) == 0);
  return address;
}

kernels::MatrixView DeviceMemory::input(const char* name, const kernels::MatrixView& host,
                                        int64_t rows, int64_t columns, int64_t element_bytes) {
  kernels::MatrixView view = host;
  view.data = nullptr;
  if (host.data == nullptr || rows == 0 || columns == 0) return view;
  const uint64_t address = allocate(name, host, rows, columns, element_bytes);
  const int64_t bytes = bytes_of(host, rows, columns, element_bytes);
  check(emulator_write(address, host.data, static_cast<uint64_t>(bytes)) == 0);
  view.data = pointer(address);
  return view;
}

const void* DeviceMemory::input(const char* name, const void* host, int64_t bytes) {
  return input(name, kernels::MatrixView{host, bytes, 1}, 1, bytes, 1).data;
}

void* DeviceMemory::output(const char* name, const kernels::MatrixView& host, int64_t rows,
                           int64_t columns, int64_t element_bytes) {
  if (host.data == nullptr || rows == 0 || columns == 0) return nullptr;
  const uint64_t address = allocate(name, host, rows, columns, element_bytes);
  auto* const to = static_cast<char*>(const_cast<void*>(host.data));
  outputs_.push_back(
      {name, address, to, rows, columns * element_bytes, host.row_stride * element_bytes});
  return pointer(address);
}

void* DeviceMemory::output(const char* name, void* host, int64_t bytes) {
  return output(name, {host, bytes}, 1, bytes, 1);
}

void* DeviceMemory::updated(const char* name, const kernels::MatrixView& host, int64_t rows,
                            int64_t columns, int64_t element_bytes) {
  void* const placed = output(name, host, rows, columns, element_bytes);
  if (placed == nullptr) return nullptr;
  const int64_t bytes = bytes_of(host, rows, columns, element_bytes);
  const auto address = reinterpret_cast<uint64_t>(placed);
  check(emulator_write(address, host.data, static_cast<uint64_t>(bytes)) == 0);
  return placed;
}

void* DeviceMemory::workspace(void* host, int64_t bytes) {
  if ((host != nullptr) != (bytes > 0))
    throw std::runtime_error("workspace: given where none is needed, or not");
  if (bytes == 0) return nullptr;
  std::memset(host, 0xa5, static_cast<size_t>(bytes));  // all of it must be there
  return pointer(allocate("workspace", bytes, nullptr));
}

void DeviceMemory::fetch() {
  for (const Output& output : outputs_) {
    const auto bytes = static_cast<uint64_t>(output.row_bytes);
    std::vector<uint8_t> undefined(bytes);
    for (int64_t row = 0; row < output.rows; ++row) {
      const uint64_t from = output.address + static_cast<uint64_t>(row * output.pitch);
      check(emulator_read_undefined(from, undefined.data(), bytes) == 0);
      const auto unwritten =
          std::count_if(undefined.begin(), undefined.end(), [](uint8_t b) { return b != 0; });
      if (unwritten > 0) {
        throw std::runtime_error(std::string(output.name) + ": " + std::to_string(unwritten) +
                                 " of " + std::to_string(bytes) + " bytes of row " +
                                 std::to_string(row) + " were not written");
      }
      check(emulator_read(from, output.host + row * output.pitch, bytes) == 0);
    }
  }
}

}  // namespace fused_lora::glue
