// Objects that C code knows by an opaque handle.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "runtime/errors.h"

namespace emulator {

// A handle is a number that is given once in the life of the process, whatever the kind of object,
// so one that was destroyed or belongs to another kind is never taken for a valid one.
inline uintptr_t next_handle() {
  static uintptr_t last = 0x1000;  // above cudaStreamLegacy and cudaStreamPerThread
  return last += 16;
}

template <class Object, class Handle>
class Handles {
 public:
  explicit Handles(const char* kind) : kind_(kind) {}

  Handle add(Object object) {
    const auto handle = reinterpret_cast<Handle>(next_handle());
    objects_.emplace(handle, std::move(object));
    return handle;
  }
  // Throws CudaError(cudaErrorInvalidResourceHandle).
  Object& get(Handle handle) {
    const auto found = objects_.find(handle);
    if (found == objects_.end()) {
      throw CudaError(cudaErrorInvalidResourceHandle,
                      std::string("this ") + kind_ + " was destroyed or never created");
    }
    return found->second;
  }
  void remove(Handle handle) {
    get(handle);
    objects_.erase(handle);
  }
  void clear() { objects_.clear(); }

 private:
  const char* kind_;
  std::map<Handle, Object> objects_;
};

}  // namespace emulator
