// Calls on memory that nobody has, which is enough for a plan, and the grid of them that is gone
// over.
#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "cpp/check.h"
#include "kernels/lora_linear.h"

namespace fused_lora::testing {

using kernels::BackwardCall;
using kernels::Device;
using kernels::DType;
using kernels::ForwardCall;
using kernels::Problem;

struct NamedDevice {
  const char* name;
  Device device;
};

inline const std::vector<NamedDevice>& devices() {
  constexpr int kKib = 1024;
  static const std::vector<NamedDevice> known = {
      {"A100", {80, 108, 163 * kKib}},    {"L4", {89, 58, 99 * kKib}},
      {"RTX 4090", {89, 128, 99 * kKib}}, {"H100", {90, 132, 227 * kKib}},
      {"B200", {100, 148, 227 * kKib}},   {"RTX 5090", {120, 170, 99 * kKib}},
  };
  return known;
}

struct Kind {
  const char* name;
  DType dtype, adapter_dtype;
  bool round_adapters, allow_tf32;
};

inline const std::vector<Kind>& kinds() {
  static const std::vector<Kind> known = {
      {"bf16", DType::kBFloat16, DType::kBFloat16, false, false},
      {"fp16", DType::kFloat16, DType::kFloat16, false, false},
      {"bf16 with masters", DType::kBFloat16, DType::kFloat32, false, false},
      {"fp16 with masters", DType::kFloat16, DType::kFloat32, false, false},
      {"bf16 with rounded masters", DType::kBFloat16, DType::kFloat32, true, false},
      {"tf32", DType::kFloat32, DType::kFloat32, false, true},
      {"fp32", DType::kFloat32, DType::kFloat32, false, false},
  };
  return known;
}

inline Problem problem(const Kind& kind, int64_t rows, int64_t in, int64_t out, int64_t rank) {
  Problem p;
  p.rows = rows;
  p.in_features = in;
  p.out_features = out;
  p.rank = rank;
  p.dtype = kind.dtype;
  p.adapter_dtype = kind.adapter_dtype;
  p.round_adapters = kind.round_adapters;
  p.allow_tf32 = kind.allow_tf32;
  return p;
}

// Addresses 2^40 bytes apart from `base` on: far enough for any operand of the tests.
class Addresses {
 public:
  explicit Addresses(uintptr_t base) : next_(base) {}
  template <typename T = void>
  T* take() {
    const uintptr_t address = next_;
    next_ += uintptr_t{1} << 40;
    return reinterpret_cast<T*>(address);
  }

 private:
  uintptr_t next_;
};

constexpr uintptr_t kAlignedBase = uintptr_t{1} << 41;

inline ForwardCall forward_call(const Problem& p, bool dropout, uintptr_t base = kAlignedBase) {
  Addresses memory(base);
  ForwardCall call;
  call.problem = p;
  call.x = {memory.take(), p.in_features, 1};
  call.weight = {memory.take(), p.in_features, 1};
  call.lora_a = {memory.take(), p.in_features, 1};
  call.lora_b = {memory.take(), p.rank, 1};
  call.y = memory.take();
  call.h = memory.take();
  if (dropout) call.dropout = {memory.take<const int64_t>(), 60000, 65536.0f / 60000};
  return call;
}

inline BackwardCall backward_call(const Problem& p, bool dropout, uintptr_t base = kAlignedBase) {
  Addresses memory(base);
  BackwardCall call;
  call.problem = p;
  call.dy = {memory.take(), p.out_features, 1};
  call.x = {memory.take(), p.in_features, 1};
  call.weight = {memory.take(), p.in_features, 1};
  call.lora_a = {memory.take(), p.in_features, 1};
  call.lora_b = {memory.take(), p.rank, 1};
  call.h = memory.take();
  call.dx = memory.take();
  call.dlora_a = memory.take();
  call.dlora_b = memory.take();
  if (dropout) call.dropout = {memory.take<const int64_t>(), 60000, 65536.0f / 60000};
  return call;
}

// The calls where another gives the frozen product.
inline ForwardCall on_base(ForwardCall call) {
  call.weight = {};
  call.base = call.y;
  call.base_stride = call.problem.out_features;
  return call;
}
inline BackwardCall without_frozen(BackwardCall call) {
  call.weight = {};
  return call;
}

// Calls `body` for every device, kind, shape, rank and with and without dropout.
inline void for_each_problem(
    const std::function<void(const Problem&, bool dropout, const Device&)>& body) {
  const std::vector<std::pair<int64_t, int64_t>> widths = {
      {64, 64}, {203, 113}, {576, 1536}, {1023, 1024}, {4096, 4096}, {1, 8}, {4096, 11008}};
  for (const NamedDevice& named : devices()) {
    for (const Kind& kind : kinds()) {
      for (const int64_t rows : {1, 7, 16, 64, 129, 2048, 8192}) {
        for (const auto& [in, out] : widths) {
          for (const int64_t rank : {1, 3, 8, 16, 40, 64, 128, 256}) {
            for (const bool dropout : {false, true}) {
              std::ostringstream text;
              text << named.name << ", " << kind.name << ", " << rows << "x" << in << "->" << out
                   << ", rank " << rank << (dropout ? ", dropout" : "");
              const Context context(text.str());
              body(problem(kind, rows, in, out, rank), dropout, named.device);
            }
          }
        }
      }
    }
  }
}

}  // namespace fused_lora::testing
