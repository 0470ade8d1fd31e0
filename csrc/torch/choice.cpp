#include "torch/cuda/choice.h"

#include <memory>
#include <mutex>
#include <unordered_map>

namespace fused_lora::cuda {
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

int64_t next_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

const char* name(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::kFloat32:
      return "float32";
    case kernels::DType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

const char* name(Layout layout) {
  switch (layout) {
    case Layout::kRows:
      return "rows";
    case Layout::kColumns:
      return "columns";
    case Layout::kNeither:
      return "neither";
    default:
      return "absent";
  }
}

ShapeClass common(const kernels::Problem& problem, const kernels::Dropout& dropout, int device) {
  ShapeClass shape;
  shape.device = device;
  shape.problem = problem;
  shape.problem.rows = next_power_of_two(problem.rows);
  shape.dropout = dropout.active();
  return shape;
}

}  // namespace

Layout layout_of(const kernels::MatrixView& view, kernels::DType dtype) {
  constexpr int64_t kChunkBytes = 16;
  const auto in_chunks = [&](int64_t stride) {
    return stride * kernels::bytes_of(dtype) % kChunkBytes == 0 &&
           reinterpret_cast<uintptr_t>(view.data) % kChunkBytes == 0;
  };
  if (view.column_stride == 1 && in_chunks(view.row_stride)) return Layout::kRows;
  if (view.row_stride == 1 && in_chunks(view.column_stride)) return Layout::kColumns;
  return Layout::kNeither;
}

ShapeClass ShapeClass::of(const kernels::ForwardCall& call, int device) {
  ShapeClass shape = common(call.problem, call.dropout, device);
  shape.bias = call.bias != nullptr;
  shape.rows = layout_of(call.x, call.problem.dtype);
  shape.weight = layout_of(call.weight, call.problem.dtype);
  return shape;
}

ShapeClass ShapeClass::of(const kernels::BackwardCall& call, const std::array<bool, 3>& needed,
                          int device) {
  ShapeClass shape = common(call.problem, call.dropout, device);
  shape.backward = true;
  shape.needs_x = needed[0];
  shape.needs_a = needed[1];
  shape.needs_b = needed[2];
  shape.rows = layout_of(call.dy, call.problem.dtype);
  if (shape.needs_a) shape.x = layout_of(call.x, call.problem.dtype);
  shape.weight = layout_of(call.weight, call.problem.dtype);
  return shape;
}

std::string ShapeClass::text() const {
  std::string text = backward ? "backward" : "forward";
  const auto add = [&](const char* what, const std::string& value) {
    text.append(" ").append(what).append("=").append(value);
  };
  add("rows", std::to_string(problem.rows));
  add("in", std::to_string(problem.in_features));
  add("out", std::to_string(problem.out_features));
  add("rank", std::to_string(problem.rank));
  add("dtype", name(problem.dtype));
  add("adapters", name(problem.adapter_dtype));
  if (problem.round_adapters) text += " rounded";
  if (problem.allow_tf32) text += " tf32";
  if (dropout) text += " dropout";
  if (bias) text += " bias";
  if (needs_x) text += " dx";
  if (needs_a) text += " da";
  if (needs_b) text += " db";
  add(backward ? "dy" : "x", name(rows));
  if (needs_a) add("x", name(x));
  add("weight", name(weight));
  return text;
}

ShapeClass::Key ShapeClass::key() const {
  const std::array<bool, 8> flags = {
      backward, problem.round_adapters, problem.allow_tf32, dropout, bias, needs_x, needs_a,
      needs_b};
  int64_t bits = 0;
  for (const bool flag : flags) bits = 2 * bits + (flag ? 1 : 0);
  const auto layouts = static_cast<int64_t>(rows) << 16 | static_cast<int64_t>(x) << 8 |
                       static_cast<int64_t>(weight);
  return {device,
          problem.rows,
          problem.in_features,
          problem.out_features,
          problem.rank,
          static_cast<int64_t>(problem.dtype),
          static_cast<int64_t>(problem.adapter_dtype),
          bits,
          layouts};
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

}  // namespace fused_lora::cuda
