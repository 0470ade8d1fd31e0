// Memory of the device and of the host, and copies between them.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "memory/allocation.h"
#include "runtime/errors.h"
#include "runtime/machine.h"
#include "runtime/registration.h"
#include "runtime/streams.h"

namespace emulator {

namespace {

// A copy of `height` rows of `width` bytes; one row for a linear copy.
struct Copy {
  void* to;
  size_t to_pitch;
  const void* from;
  size_t from_pitch;
  size_t width;
  size_t height;
  cudaMemcpyKind kind;
};

constexpr cudaGraphNodeType kMemcpy = cudaGraphNodeTypeMemcpy;
constexpr cudaGraphNodeType kMemset = cudaGraphNodeTypeMemset;

// Page-locked host memory: its start and its bytes. Never destroyed.
std::map<uintptr_t, size_t>& pinned() {
  static auto& pinned = *new std::map<uintptr_t, size_t>;
  return pinned;
}

DeviceMemory& memory() {
  return Machine::instance().memory;
}

uint64_t device_address(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

bool is_device(const void* pointer) {
  return memory().find(device_address(pointer)) != nullptr;
}

bool is_pinned(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto after = pinned().upper_bound(address);
  return after != pinned().begin() && address - std::prev(after)->first < std::prev(after)->second;
}

uint64_t allocated_bytes() {
  uint64_t bytes = 0;
  for (const Allocation* allocation : memory().allocations()) bytes += allocation->bytes;
  return bytes;
}

void allocate(void** pointer, size_t bytes) {
  require(pointer, "devPtr");
  *pointer = nullptr;
  if (bytes == 0) return;
  const auto total = static_cast<uint64_t>(Machine::instance().limits.memory_bytes);
  const uint64_t used = allocated_bytes();
  if (used > total || bytes > total - used) {
    throw CudaError(cudaErrorMemoryAllocation, std::to_string(bytes) + " bytes with " +
                                                   std::to_string(used) + " of " +
                                                   std::to_string(total) + " in use");
  }
  static int count = 0;
  *pointer =
      reinterpret_cast<void*>(memory().allocate(bytes, "cudaMalloc " + std::to_string(++count)));
}

void allocate_host(void** pointer, size_t bytes) {
  require(pointer, "ptr");
  *pointer = nullptr;
  if (bytes == 0) return;
  constexpr size_t kPage = 4096;
  *pointer = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  if (*pointer == nullptr) {
    throw CudaError(cudaErrorMemoryAllocation, std::to_string(bytes) + " bytes of host memory");
  }
  pinned()[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
}

// Throws where the rows do not lie where the copy's kind says.
void check_side(const char* argument, const void* pointer, bool on_device, size_t pitch,
                size_t width, size_t height) {
  require(pointer, argument);
  if (!on_device) {
    if (is_device(pointer)) throw ArgumentError(std::string(argument) + " is device memory");
    return;
  }
  const uint64_t bytes = pitch * (height - 1) + width;
  if (!memory().contains(device_address(pointer), bytes)) {
    throw ArgumentError(std::string(argument) + ": " + std::to_string(bytes) +
                        " bytes from here do not lie in one allocation of the device");
  }
}

struct Sides {
  bool to_device;
  bool from_device;
};

Sides sides_of(const Copy& copy) {
  switch (copy.kind) {
    case cudaMemcpyHostToHost:
      return {false, false};
    case cudaMemcpyHostToDevice:
      return {true, false};
    case cudaMemcpyDeviceToHost:
      return {false, true};
    case cudaMemcpyDeviceToDevice:
      return {true, true};
    case cudaMemcpyDefault:
      return {is_device(copy.to), is_device(copy.from)};
  }
  throw CudaError(cudaErrorInvalidMemcpyDirection, "kind is " + std::to_string(copy.kind));
}

void copy_rows(const Copy& copy, Sides sides) {
  for (size_t row = 0; row < copy.height; ++row) {
    auto* to = static_cast<char*>(copy.to) + row * copy.to_pitch;
    const auto* from = static_cast<const char*>(copy.from) + row * copy.from_pitch;
    if (sides.to_device && sides.from_device) {
      memory().copy(device_address(to), device_address(from), copy.width);
    } else if (sides.to_device) {
      memory().write(device_address(to), from, copy.width);
    } else if (sides.from_device) {
      memory().read(device_address(from), to, copy.width);
    } else {
      std::memmove(to, from, copy.width);
    }
  }
}

void enqueue_copy(const Copy& copy, cudaStream_t stream, bool synchronous = false) {
  const Sides sides = sides_of(copy);
  if (copy.width > copy.to_pitch || copy.width > copy.from_pitch) {
    throw CudaError(cudaErrorInvalidPitchValue,
                    "width is " + std::to_string(copy.width) + ", the pitches are " +
                        std::to_string(copy.to_pitch) + " and " + std::to_string(copy.from_pitch));
  }
  if (copy.width == 0 || copy.height == 0) return;
  check_side("dst", copy.to, sides.to_device, copy.to_pitch, copy.width, copy.height);
  check_side("src", copy.from, sides.from_device, copy.from_pitch, copy.width, copy.height);
  const bool pageable =
      (!sides.to_device && !is_pinned(copy.to)) || (!sides.from_device && !is_pinned(copy.from));
  if (pageable) refuse_if_capturing(stream, "a copy of pageable host memory waits for the stream");
  enqueue(stream, kMemcpy, [copy, sides, synchronous] {
    if (synchronous) refuse_while_capturing();
    copy_rows(copy, sides);
  });
}

Copy linear(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return {to, bytes, from, bytes, bytes, 1, kind};
}

// The copy of a call that returns only when it is done.
void copy_now(const Copy& copy) {
  enqueue_copy(copy, cudaStreamLegacy, true);
}

void enqueue_fill(void* pointer, size_t pitch, int value, size_t width, size_t height,
                  cudaStream_t stream) {
  if (width > pitch) {
    throw CudaError(cudaErrorInvalidPitchValue,
                    "width is " + std::to_string(width) + ", pitch " + std::to_string(pitch));
  }
  if (width == 0 || height == 0) return;
  check_side("devPtr", pointer, true, pitch, width, height);
  enqueue(stream, kMemset, [=] {
    for (size_t row = 0; row < height; ++row) {
      memory().fill(device_address(pointer) + row * pitch, static_cast<uint8_t>(value), width);
    }
  });
}

// The bytes [offset, offset + count) of a device variable.
void* within(const void* symbol, size_t count, size_t offset) {
  const DeviceVariable& variable = find_variable(symbol);
  if (offset > variable.bytes || count > variable.bytes - offset) {
    throw ArgumentError("count " + std::to_string(count) + " at offset " + std::to_string(offset) +
                        ": " + variable.name + " has " + std::to_string(variable.bytes) + " bytes");
  }
  return reinterpret_cast<void*>(variable.address() + offset);
}

Copy to_symbol(const void* symbol, const void* from, size_t count, size_t offset,
               cudaMemcpyKind kind) {
  if (kind == cudaMemcpyHostToHost || kind == cudaMemcpyDeviceToHost) {
    throw CudaError(cudaErrorInvalidMemcpyDirection, "a symbol is device memory");
  }
  return linear(within(symbol, count, offset), from, count, kind);
}

Copy from_symbol(void* to, const void* symbol, size_t count, size_t offset, cudaMemcpyKind kind) {
  if (kind == cudaMemcpyHostToHost || kind == cudaMemcpyHostToDevice) {
    throw CudaError(cudaErrorInvalidMemcpyDirection, "a symbol is device memory");
  }
  return linear(to, within(symbol, count, offset), count, kind);
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

// ---- allocations
// ----------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return run_call("cudaMalloc", [&] {
    refuse_while_capturing();
    allocate(pointer, bytes);
  });
}

cudaError_t cudaFree(void* pointer) {
  return run_call("cudaFree", [&] {
    refuse_while_capturing();
    if (pointer != nullptr) memory().free(device_address(pointer));
  });
}

cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t stream) {
  return run_call("cudaMallocAsync", [&] {
    refuse_if_capturing(stream, "allocations in graphs are not emulated");
    allocate(pointer, bytes);
  });
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  return run_call("cudaFreeAsync", [&] {
    refuse_if_capturing(stream, "allocations in graphs are not emulated");
    if (pointer != nullptr) memory().free(device_address(pointer));
  });
}

// Device code cannot reach host memory here, so that only the portable flag has an effect to
// honour.
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  return run_call("cudaHostAlloc", [&] {
    if ((flags & ~unsigned{cudaHostAllocPortable}) != 0) {
      throw CudaError(cudaErrorNotSupported, "flags is " + std::to_string(flags));
    }
    refuse_while_capturing();
    allocate_host(pointer, bytes);
  });
}

cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return run_call("cudaMallocHost", [&] {
    refuse_while_capturing();
    allocate_host(pointer, bytes);
  });
}

cudaError_t cudaFreeHost(void* pointer) {
  return run_call("cudaFreeHost", [&] {
    refuse_while_capturing();
    if (pointer == nullptr) return;
    if (pinned().erase(reinterpret_cast<uintptr_t>(pointer)) == 0) {
      throw ArgumentError("ptr is no start of page-locked host memory");
    }
    std::free(pointer);
  });
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  return run_call("cudaMemGetInfo", [&] {
    require(free_bytes, "free");
    require(total_bytes, "total");
    *total_bytes = static_cast<size_t>(Machine::instance().limits.memory_bytes);
    *free_bytes = *total_bytes - std::min<size_t>(*total_bytes, allocated_bytes());
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return run_call("cudaPointerGetAttributes", [&] {
    require(attributes, "attributes");
    *attributes = {};
    auto* plain = const_cast<void*>(pointer);
    if (is_device(pointer)) {
      attributes->type = cudaMemoryTypeDevice;
      attributes->devicePointer = plain;
    } else if (is_pinned(pointer)) {
      attributes->type = cudaMemoryTypeHost;
      attributes->hostPointer = plain;
    } else {
      attributes->type = cudaMemoryTypeUnregistered;
      attributes->device = cudaInvalidDeviceId;
      attributes->hostPointer = plain;
    }
  });
}

// ---- copies
// ---------------------------------------------------------------------------------------

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return run_call("cudaMemcpy", [&] { copy_now(linear(to, from, bytes, kind)); });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return run_call("cudaMemcpyAsync", [&] { enqueue_copy(linear(to, from, bytes, kind), stream); });
}

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t height, cudaMemcpyKind kind) {
  return run_call("cudaMemcpy2D",
                  [&] { copy_now({to, to_pitch, from, from_pitch, width, height, kind}); });
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  return run_call("cudaMemcpy2DAsync", [&] {
    enqueue_copy({to, to_pitch, from, from_pitch, width, height, kind}, stream);
  });
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return run_call("cudaMemset",
                  [&] { enqueue_fill(pointer, bytes, value, bytes, 1, cudaStreamLegacy); });
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  return run_call("cudaMemsetAsync",
                  [&] { enqueue_fill(pointer, bytes, value, bytes, 1, stream); });
}

cudaError_t cudaMemset2D(void* pointer, size_t pitch, int value, size_t width, size_t height) {
  return run_call("cudaMemset2D",
                  [&] { enqueue_fill(pointer, pitch, value, width, height, cudaStreamLegacy); });
}

cudaError_t cudaMemset2DAsync(void* pointer, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream) {
  return run_call("cudaMemset2DAsync",
                  [&] { enqueue_fill(pointer, pitch, value, width, height, stream); });
}

// ---- device variables
// -----------------------------------------------------------------------------

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t count, size_t offset,
                               cudaMemcpyKind kind) {
  return run_call("cudaMemcpyToSymbol",
                  [&] { copy_now(to_symbol(symbol, from, count, offset, kind)); });
}

cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t count,
                                    size_t offset, cudaMemcpyKind kind, cudaStream_t stream) {
  return run_call("cudaMemcpyToSymbolAsync",
                  [&] { enqueue_copy(to_symbol(symbol, from, count, offset, kind), stream); });
}

cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t count, size_t offset,
                                 cudaMemcpyKind kind) {
  return run_call("cudaMemcpyFromSymbol",
                  [&] { copy_now(from_symbol(to, symbol, count, offset, kind)); });
}

cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t count, size_t offset,
                                      cudaMemcpyKind kind, cudaStream_t stream) {
  return run_call("cudaMemcpyFromSymbolAsync",
                  [&] { enqueue_copy(from_symbol(to, symbol, count, offset, kind), stream); });
}

cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  return run_call("cudaGetSymbolAddress", [&] {
    require(pointer, "devPtr");
    *pointer = reinterpret_cast<void*>(find_variable(symbol).address());
  });
}

cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  return run_call("cudaGetSymbolSize", [&] {
    require(bytes, "size");
    *bytes = find_variable(symbol).bytes;
  });
}
}
