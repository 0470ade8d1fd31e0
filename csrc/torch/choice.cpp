#include "torch/choice.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

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

// A path's times.
class Timings {
 public:
  double run(const std::function<double()>& path) {
    times_.push_back(path());
    least_ = std::min(least_, times_.back());
    return times_.back();
  }

  double least() const { return least_; }

  // Whether the least time is no luck, and not that of a machine that is busy for a while.
  bool settled() const {
    constexpr double kNear = 1.03;
    constexpr int64_t kOften = 5;
    return std::count_if(times_.begin(), times_.end(),
                         [&](double time) { return time <= kNear * least_; }) >= kOften;
  }

 private:
  std::vector<double> times_;
  double least_ = std::numeric_limits<double>::infinity();
};

}  // namespace

Times time_in_turns(const std::function<double()>& fused, const std::function<double()>& composed) {
  constexpr double kLeast = 5, kEnough = 60;  // milliseconds
  constexpr int kFewest = 3, kMost = 1000;    // turns
  Timings of_fused, of_composed;
  double spent = 0;
  const auto goes_on = [&](int turns) {
    if (turns < kFewest) return true;
    if (turns == kMost || spent >= kEnough) return false;
    return spent < kLeast || !of_fused.settled() || !of_composed.settled();
  };
  for (int turns = 0; goes_on(turns); ++turns) {
    // Every second time the other way round: neither always finds what the other leaves in caches.
    const bool forth = turns % 2 == 0;
    spent += forth ? of_fused.run(fused) : of_composed.run(composed);
    spent += forth ? of_composed.run(composed) : of_fused.run(fused);
  }
  return {of_fused.least(), of_composed.least()};
}

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
