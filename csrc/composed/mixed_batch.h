// The composed path of a batch whose rows belong to different adapters, and some to none: for row i
// of adapter j
//
//     y[i]  = x[i] Wᵀ + b + h[i] Bⱼᵀ        h[i] = sⱼ · drop(x[i]) Aⱼᵀ
//     dx[i] = dy[i] W + drop'(g[i] Aⱼ)      g[i] = sⱼ · dy[i] Bⱼ
//     dAⱼ = Σ g[i]ᵀ drop(x[i])              dBⱼ = Σ dy[i]ᵀ h[i]       over the rows of adapter j
//
// Nothing of an adapter reaches another's rows. Arguments are taken as checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "composed/rows.h"

namespace fused_lora::composed {

// n adapters: a: r×K each, b: N×r each. index: M, int64; negative for none.
struct MixedAdapters {
  at::TensorList a, b;
  at::ArrayRef<double> scaling;
  const at::Tensor& index;

  int64_t count() const { return static_cast<int64_t>(a.size()); }
  int64_t ranks() const {
    int64_t sum = 0;
    for (const at::Tensor& one : a) sum += one.size(0);
    return sum;
  }
};

// Of every row of x, or dy: its adapter's index. index: of the first dimensions of them.
at::Tensor index_of_rows(const at::Tensor& index, const at::Tensor& rows);

// Returns (y, h). h: M×R, the adapters' ranks side by side, zeros but in those of the row's.
std::tuple<at::Tensor, at::Tensor> mixed_forward(const at::Tensor& x, const at::Tensor& weight,
                                                 const MixedAdapters& adapters,
                                                 const std::optional<at::Tensor>& bias,
                                                 const Dropout& dropout, bool round_adapters);

struct MixedNeeded {
  bool x = false, weight = false, bias = false;
  std::vector<bool> a, b;

  bool any_a() const;
  bool any_b() const;
};

// Undefined where not needed.
struct MixedGradients {
  at::Tensor x, weight, bias;
  std::vector<at::Tensor> a, b;
};

// x is read only for dweight and da, h only for db; without h, which a graph of the backward itself
// (create_graph) asks for, it is made of x again. All of torch's own differentiable operations.
MixedGradients mixed_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                              const at::Tensor& weight, const MixedAdapters& adapters,
                              const std::optional<at::Tensor>& h, const Dropout& dropout,
                              bool round_adapters, const MixedNeeded& needed);

}  // namespace fused_lora::composed
