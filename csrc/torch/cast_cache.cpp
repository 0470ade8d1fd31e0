#include "torch/cast_cache.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <mutex>
#include <unordered_map>
#include <vector>

#include "torch/packed_weight.h"

namespace fused_lora::cast_cache {
namespace {

// Known by its memory, not by its tensor, so that every view of a weight (Conv1D passes a
// transpose) finds the same copy.
struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  int64_t version;
  std::vector<int64_t> sizes, strides;
  at::Tensor copy;

  bool serves(const at::Tensor& weight, at::ScalarType dtype) const {
    // Its address may have come back as another's memory: freed, or given back while the storage
    // lives.
    return storage.lock().get() == weight.storage().unsafeGetStorageImpl() &&
           version == weight._version() && weight.sizes().equals(sizes) &&
           weight.strides().equals(strides) && copy.scalar_type() == dtype;
  }
};

std::mutex mutex;
std::unordered_map<const void*, Entry>& entries() {
  // Never destroyed: tensors must not be freed after torch's own allocators are gone.
  static auto* map = new std::unordered_map<const void*, Entry>();
  return *map;
}

// Fake, traced, batched and subclassed tensors have no storage to remember a copy by, and inference
// tensors no version.
bool may_be_kept(const at::Tensor& t) {
  return t.has_storage() && !t.is_inference() && !t.is_meta() && !at::isTensorSubclassLike(t);
}

// What was packed is packed again, where its dtype has panels.
at::Tensor converted(const at::Tensor& weight, at::ScalarType dtype) {
  const at::Tensor copy = plain(weight).to(dtype);
  return is_packed(weight) && has_panels(dtype) ? ops::pack_weight(copy) : copy;
}

}  // namespace

at::Tensor cast(const at::Tensor& weight, at::ScalarType dtype) {
  if (!may_be_kept(weight)) return plain(weight).to(dtype);
  const void* key = weight.const_data_ptr();
  const std::lock_guard<std::mutex> lock(mutex);
  auto& map = entries();
  if (const auto found = map.find(key); found != map.end()) {
    if (found->second.serves(weight, dtype)) return found->second.copy;
    map.erase(found);
  }
  for (auto it = map.begin(); it != map.end();) {
    it = it->second.storage.expired() ? map.erase(it) : std::next(it);
  }
  // Outside inference mode and grad mode, so that the copy may serve a training step later.
  const c10::InferenceMode no_inference(false);
  const at::NoGradGuard no_grad;
  at::Tensor copy = converted(weight.detach(), dtype);
  map.emplace(key, Entry{weight.storage().getWeakStorageImpl(), weight._version(),
                         weight.sizes().vec(), weight.strides().vec(), copy});
  return copy;
}

void clear() {
  const std::lock_guard<std::mutex> lock(mutex);
  entries().clear();
}

}  // namespace fused_lora::cast_cache
