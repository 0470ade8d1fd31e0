// The fused LoRA linear on the CPU: what to compute, and the call that computes it.
//
//     y  = x Wᵀ + b + h Bᵀ            x: M×K   W: N×K   A: r×K   B: N×r   y: M×N
//     h  = s · drop(x) Aᵀ             h: M×r   (kept for backward)
//     g  = s · dy B                   g: M×r
//     dx = dy W + drop'(g A)          dA = gᵀ drop(x)   dB = dyᵀ h
//
// A frozen layer may compute by itself, and hand over what it gave: then y = base + h Bᵀ, and the
// terms of W and b are not there.
//
// The low-rank product is a few more steps of depth in the tile of the frozen one. The dropout mask
// is drawn once in a call, a bit for an element of x, and nothing else of x's size is written.
//
// Torch-free. A call describes operands by raw pointers and int64 strides and brings its threads as
// a callback. Results do not depend on how many threads there are, nor on who takes which part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace fused_lora::cpu::fused {

// The instructions that a build of the kernels uses. Every level computes every call.
enum class Level : int32_t { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

// Whether this binary has the level and this processor its instructions.
bool supported(Level level);
Level best_level();

enum class DType : int32_t { kFloat32, kBFloat16 };

// Element (i, j) lies at data + i * row_stride + j * column_stride, in elements.
struct MatrixView {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;

  MatrixView transposed() const { return {data, column_stride, row_stride}; }
};

// Dropout of x by the rule of common/dropout.h. keep = 65536 keeps everything and reads no seed.
struct Dropout {
  uint64_t seed = 0;
  uint32_t keep = 65536;    // of 65536
  float scale = 1.0f;       // 65536 / keep; 0 where nothing is kept
  int64_t first_block = 0;  // in the mask, of x's columns: they begin at 8 · first_block

  bool active() const { return keep < 65536; }
};

struct Problem {
  int64_t rows = 0;                       // M: rows of x, dy, y and dx
  int64_t in_features = 0;                // K
  int64_t out_features = 0;               // N
  int64_t rank = 0;                       // r
  DType dtype = DType::kFloat32;          // of x, W, b, y and dy, dx
  DType adapter_dtype = DType::kFloat32;  // of A and B: dtype, or fp32 masters beside bf16
  bool round_adapters = false;            // masters are rounded to dtype first, as autocast does
  bool weight_in_panels = false;          // as weight_panels.h lays it: its strides are not read
  bool y_in_other_dtype = false;          // base, y and dy, where there is no frozen product
};

// Of y, base and dy.
inline DType y_dtype(const Problem& p) {
  const DType other = p.dtype == DType::kFloat32 ? DType::kBFloat16 : DType::kFloat32;
  return p.y_in_other_dtype ? other : p.dtype;
}

// The dtype of h and g, and of the low-rank products. Sums are in fp32 always.
inline DType rank_dtype(const Problem& p) {
  return p.round_adapters ? p.dtype : p.adapter_dtype;
}

struct ForwardCall {
  Problem problem;
  MatrixView x;                // M×K
  MatrixView weight;           // N×K, in either storage order (Conv1D's is transposed)
  MatrixView lora_a;           // r×K
  MatrixView lora_b;           // N×r
  const void* bias = nullptr;  // N, or none
  float scaling = 1.0f;
  Dropout dropout;
  // M×N in y's dtype; its columns lie side by side. Where it is given, weight and bias are not
  // read. It may be y itself.
  const void* base = nullptr;
  int64_t base_stride = 0;  // of its rows
  void* y = nullptr;        // M×N, dense
  void* h = nullptr;        // M×r, in rank_dtype
  int64_t h_stride = 0;     // of h's rows; 0: they lie dense
};

// dx, dlora_a and dlora_b may each be null: then it is not computed, and neither is what only it
// needs. x is read for dlora_a alone, h for dlora_b alone, weight for dx alone; a weight without
// data has no part in dx.
struct BackwardCall {
  Problem problem;
  MatrixView dy;            // M×N
  MatrixView x;             // M×K
  MatrixView weight;        // N×K
  MatrixView lora_a;        // r×K
  MatrixView lora_b;        // N×r
  const void* h = nullptr;  // M×r, in rank_dtype
  int64_t h_stride = 0;     // of h's rows; 0: they lie dense
  float scaling = 1.0f;
  Dropout dropout;
  void* g = nullptr;        // M×r, dense, in rank_dtype: the caller's scratch, for dx and dlora_a
  void* dx = nullptr;       // M×K, dense, in dtype
  void* dlora_a = nullptr;  // r×K, dense, in adapter_dtype
  void* dlora_b = nullptr;  // N×r, dense, in adapter_dtype
};

// How a call runs its parts: run(context, tasks, body, closure) calls body(closure, begin, end)
// until every task of 0 .. tasks-1 is done, in any order, on any threads, and then returns.
struct Parallel {
  using Body = void (*)(void* closure, int64_t begin, int64_t end);
  void (*run)(void* context, int64_t tasks, Body body, void* closure) = nullptr;  // null: serial
  void* context = nullptr;
  int threads = 1;  // how many there are to feed; decides the cut, never the result
};

// Calls of one x, whose rows are read while they are near for all of them. In a backward the calls'
// dx, where not null, are one: each later call adds its own to what is there, and an addition
// rounds once to dtype.
void run(std::span<const ForwardCall> calls, Level level, const Parallel& parallel);
void run(std::span<const BackwardCall> calls, Level level, const Parallel& parallel);

}  // namespace fused_lora::cpu::fused
