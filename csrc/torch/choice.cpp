#include "torch/choice.h"

#include <memory>
#include <mutex>
#include <unordered_map>

namespace fused_lora {
namespace {

struct HashKey {
  size_t operator()(const ShapeClass::Key& key) const {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a field at a time
    for (const int64_t field : key) {
      hash = (hash ^ static_cast<uint64_t>(field)) * 0x100000001b3u;
      hash ^= hash >> 32;
    }
    return static_cast<size_t>(hash);
  }
};

struct Choices {
  std::mutex mutex;
  std::unordered_map<ShapeClass::Key, Path, HashKey> made;
  std::shared_ptr<const Policy> policy;
};

Choices& choices() {
  // Never destroyed: the policy is Python's, and the interpreter is gone by then.
  static auto* all = new Choices;
  return *all;
}

}  // namespace

Path untimed_choice(Candidate& call) {
  return call.presumed_faster() ? Path::kFused : Path::kComposed;
}

Path choose(const ShapeClass& shape, bool deterministic, Candidate& call) {
  if (deterministic) return untimed_choice(call);
  Choices& all = choices();
  const ShapeClass::Key key = shape.key();
  std::shared_ptr<const Policy> policy;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.made.find(key);
    if (found != all.made.end()) return found->second;
    policy = all.policy;
  }
  // Unlocked: the policy takes Python's own lock, and whoever holds that may wait for this one. Two
  // threads may come here at once; then the first answer counts for both.
  const Path path = policy != nullptr ? (*policy)(shape, call) : untimed_choice(call);
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.made.emplace(key, path).first->second;
}

void set_policy(Policy policy) {
  auto kept = policy ? std::make_shared<const Policy>(std::move(policy)) : nullptr;
  const std::lock_guard<std::mutex> lock(choices().mutex);
  choices().policy = std::move(kept);
}

void forget_choices() {
  const std::lock_guard<std::mutex> lock(choices().mutex);
  choices().made.clear();
}

}  // namespace fused_lora
