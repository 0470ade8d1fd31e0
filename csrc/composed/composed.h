// The composed path: torch's own GEMMs, with the low-rank product accumulated in place.
//
//     y  = x Wᵀ + b + h Bᵀ            x: M×K   W: N×K   A: r×K   B: N×r   y: M×N
//     h  = s · drop(x) Aᵀ             h: M×r   (kept for backward)
//     g  = s · dy B                   g: M×r
//     dx = dy W + drop'(g A)          dA = gᵀ drop(x)   dB = dyᵀ h   dW = dyᵀ x   db = Σ dy
//
// Device-independent ATen. Arguments are taken as checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "composed/rows.h"

namespace fused_lora::composed {

// The dtype of h, g and the low-rank products: the adapters' own, unless fp32 masters are to be
// rounded to the dtype of the long operand (x, dy) first, as autocast does.
at::ScalarType rank_dtype(const at::Tensor& rows, const at::Tensor& lora_a, bool round_adapters);
at::ScalarType rank_dtype(at::ScalarType rows, const at::Tensor& lora_a, bool round_adapters);

// Returns (y, h). y: x's leading dimensions × N in x's dtype; h: M×r in rank_dtype.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight,
                                           const at::Tensor& lora_a, const at::Tensor& lora_b,
                                           const std::optional<at::Tensor>& bias, double scaling,
                                           const Dropout& dropout, bool round_adapters);

// One of several projections of x, with what `forward` is given of it.
struct Projection {
  at::Tensor weight, lora_a, lora_b;
  std::optional<at::Tensor> bias;
  double scaling;
  Dropout dropout;
};

// rows: M×K. Returns the projections' y, each M×N, and their h side by side, M×Σr. Where no mask
// and no factor tell them apart, h is one product with the A's stacked.
std::tuple<std::vector<at::Tensor>, at::Tensor> forward(const at::Tensor& rows,
                                                        const std::vector<Projection>& projections,
                                                        bool round_adapters);

// (dx, dweight, dlora_a, dlora_b, dbias); undefined where not needed.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Needed = std::array<bool, 5>;

// x is read only for dweight and dlora_a, h only for dlora_b. `dx_sum`, where defined, is what dx
// is added to, in place, and returned as.
Gradients backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                   const at::Tensor& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                   const std::optional<at::Tensor>& h, double scaling, const Dropout& dropout,
                   bool round_adapters, const Needed& needed, const at::Tensor& dx_sum = {});

// Beside a frozen layer that computes by itself: adds h Bᵀ, in place, to what that one gave, in
// whichever dtype that is. base: M×N. Returns h.
at::Tensor add_forward(const at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, double scaling, const Dropout& dropout,
                       bool round_adapters);

// (dx, dlora_a, dlora_b), without a term of W; undefined where not needed.
using AddGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using AddNeeded = std::array<bool, 3>;

// dy is in base's dtype. dtype: x's, and dx's.
AddGradients add_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                          const at::Tensor& lora_a, const at::Tensor& lora_b,
                          const std::optional<at::Tensor>& h, at::ScalarType dtype, double scaling,
                          const Dropout& dropout, bool round_adapters, const AddNeeded& needed);

// The same ops and gradients out of torch's differentiable operations alone (differentiable.cpp),
// for who derives in other ways than one backward: a graph of the backward itself (create_graph),
// transforms of torch.func, forward-mode derivatives. Slower, and no more sparing than torch.

// A dropout mask drawn whole. keep: M×K, zeros and ones; undefined where nothing is dropped.
struct Mask {
  at::Tensor keep;
  double scale = 1.0;

  // t: M elements by K, in any number of dimensions.
  at::Tensor operator()(const at::Tensor& t) const;
};

// Sizes may be symbolic.
at::Tensor differentiable_forward(const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& lora_a, const at::Tensor& lora_b,
                                  const std::optional<at::Tensor>& bias, double scaling,
                                  const Mask& drop, bool round_adapters);

Gradients differentiable_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                  const at::Tensor& weight, const at::Tensor& lora_a,
                                  const at::Tensor& lora_b, double scaling, const Mask& drop,
                                  bool round_adapters, const Needed& needed);

at::Tensor differentiable_add_forward(const at::Tensor& base, const at::Tensor& x,
                                      const at::Tensor& lora_a, const at::Tensor& lora_b,
                                      double scaling, const Mask& drop, bool round_adapters);

AddGradients differentiable_add_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                         const at::Tensor& lora_a, const at::Tensor& lora_b,
                                         at::ScalarType dtype, double scaling, const Mask& drop,
                                         bool round_adapters, const AddNeeded& needed);

}  // namespace fused_lora::composed
