#include "torch/cast_cache.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "torch/packed_weight.h"

namespace fused_lora::cast_cache {
namespace {

// A tensor known by its memory, so that every view of a weight (Conv1D passes a transpose) is the
// same.
struct Source {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* data;
  int64_t version;
  std::vector<int64_t> sizes, strides;

  explicit Source(const at::Tensor& t)
      : storage(t.storage().getWeakStorageImpl()),
        data(t.const_data_ptr()),
        version(t._version()),
        sizes(t.sizes().vec()),
        strides(t.strides().vec()) {}

  bool is(const at::Tensor& t) const {
    // Its address may have come back as another's memory: freed, or given back while the storage
    // lives.
    return storage.lock().get() == t.storage().unsafeGetStorageImpl() &&
           data == t.const_data_ptr() && version == t._version() && t.sizes().equals(sizes) &&
           t.strides().equals(strides);
  }
};

struct Entry {
  Source source;
  at::Tensor copy;
};

std::mutex mutex;
std::unordered_map<const void*, Entry>& entries() {
  // Never destroyed: tensors must not be freed after torch's own allocators are gone.
  static auto* map = new std::unordered_map<const void*, Entry>();
  return *map;
}

// What was packed is packed again, where its dtype has panels.
at::Tensor converted(const at::Tensor& weight, at::ScalarType dtype) {
  const at::Tensor copy = plain(weight).to(dtype);
  return is_packed(weight) && has_panels(dtype) ? ops::pack_weight(copy) : copy;
}

}  // namespace

bool may_be_kept(const at::Tensor& t) {
  return t.has_storage() && !t.is_inference() && !t.is_meta() && !t.is_neg() &&
         !at::isTensorSubclassLike(t);
}

at::Tensor cast(const at::Tensor& weight, at::ScalarType dtype) {
  if (!may_be_kept(weight)) return plain(weight).to(dtype);
  const void* key = weight.const_data_ptr();
  const std::lock_guard<std::mutex> lock(mutex);
  auto& map = entries();
  if (const auto found = map.find(key); found != map.end()) {
    const auto& [source, copy] = found->second;
    if (source.is(weight) && copy.scalar_type() == dtype) return copy;
    map.erase(found);
  }
  for (auto it = map.begin(); it != map.end();) {
    it = it->second.source.storage.expired() ? map.erase(it) : std::next(it);
  }
  // Outside inference mode and grad mode, so that the copy may serve a training step later.
  const c10::InferenceMode no_inference(false);
  const at::NoGradGuard no_grad;
  at::Tensor copy = converted(weight.detach(), dtype);
  map.emplace(key, Entry{Source(weight), copy});
  return copy;
}

at::Tensor shared_cast(const at::Tensor& x, at::ScalarType dtype) {
  struct Last {
    Source source;
    c10::Stream stream;  // whoever waits for x on another one does not wait for the cast
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    at::TensorOptions options;
    std::vector<int64_t> strides;
  };
  // Of this thread's last call: q, k and v follow each other. Holds neither x nor the cast.
  thread_local std::optional<Last> last;
  const c10::Stream stream = c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device());
  if (last && last->source.is(x) && last->stream == stream && last->options.dtype() == dtype) {
    if (auto storage = last->storage.lock()) {
      return at::empty({0}, last->options)
          .set_(c10::Storage(std::move(storage)), /*storage_offset=*/0, x.sizes(), last->strides);
    }
  }
  at::Tensor copy = x.to(dtype);
  last.emplace(Last{Source(x), stream, copy.storage().getWeakStorageImpl(), copy.options(),
                    copy.strides().vec()});
  return copy;
}

void clear() {
  const std::lock_guard<std::mutex> lock(mutex);
  entries().clear();
}

}  // namespace fused_lora::cast_cache
