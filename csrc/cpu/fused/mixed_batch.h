// The fused LoRA linear on the CPU for a batch whose rows belong to different adapters, and some to
// none. For row i of adapter j:
//
//     y[i]  = x[i] Wᵀ + b + h[i] Bⱼᵀ        h[i] = sⱼ · drop(x[i]) Aⱼᵀ
//     dx[i] = dy[i] W + drop'(g[i] Aⱼ)      g[i] = sⱼ · dy[i] Bⱼ
//     dAⱼ = Σ g[i]ᵀ drop(x[i])              dBⱼ = Σ dy[i]ᵀ h[i]       over the rows of adapter j
//
// The frozen products take all rows together; an adapter meets its own rows alone, so nothing of
// it, not even a number that is not finite, reaches another's. Rows may lie in any order. Where an
// adapter's lie apart, they are gathered: x, y (and dy, dx) are copied once.
//
// Torch-free, as lora_linear.h.
#pragma once

#include <cstdint>

#include "cpu/fused/lora_linear.h"

namespace fused_lora::cpu::fused {

struct Adapter {
  MatrixView a;      // r×K
  MatrixView b;      // N×r
  int64_t rank = 0;  // r
  float scaling = 1.0f;
  // Of a backward; null: not computed.
  void* da = nullptr;  // r×K, dense, in adapter_dtype
  void* db = nullptr;  // N×r, dense, in adapter_dtype
};

struct MixedForwardCall {
  Problem problem;    // its rank is R = Σ r
  MatrixView x;       // M×K
  MatrixView weight;  // N×K
  const Adapter* adapters = nullptr;
  int64_t adapter_count = 0;
  const int64_t* adapter_of_row = nullptr;  // M: 0 .. adapter_count-1, or negative for none
  const void* bias = nullptr;               // N, or none
  Dropout dropout;
  void* y = nullptr;  // M×N, dense
  // M×R, dense, in rank_dtype: the adapters' ranks side by side, zeros but in those of the row's.
  void* h = nullptr;
};

// dx may be null. x is read for da alone, h for db alone, weight for dx alone.
struct MixedBackwardCall {
  Problem problem;
  MatrixView dy;      // M×N
  MatrixView x;       // M×K
  MatrixView weight;  // N×K
  const Adapter* adapters = nullptr;
  int64_t adapter_count = 0;
  const int64_t* adapter_of_row = nullptr;
  const void* h = nullptr;  // as the forward made it
  Dropout dropout;
  void* dx = nullptr;  // M×K, dense, in dtype
};

void run(const MixedForwardCall& call, Level level, const Parallel& parallel);
void run(const MixedBackwardCall& call, Level level, const Parallel& parallel);

}  // namespace fused_lora::cpu::fused
