#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>

#include "composed/composed.h"
#include "composed/shapes.h"

namespace fused_lora::composed {

at::Tensor Mask::operator()(const at::Tensor& t) const {
  return keep.defined() ? t * keep.reshape_symint(t.sym_sizes()) * scale : t;
}

at::Tensor differentiable_forward(const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& lora_a, const at::Tensor& lora_b,
                                  const std::optional<at::Tensor>& bias, double scaling,
                                  const Mask& drop, bool round_adapters) {
  const auto low = rank_dtype(x, lora_a, round_adapters);
  const at::Tensor h = at::linear(drop(x.to(low)), lora_a.to(low)) * scaling;
  return (at::linear(x, weight, bias) + at::linear(h, lora_b.to(low))).to(x.scalar_type());
}

// h is formed again from x and A here: the saved one has no graph behind it.
Gradients differentiable_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                  const at::Tensor& weight, const at::Tensor& lora_a,
                                  const at::Tensor& lora_b, double scaling, const Mask& drop,
                                  bool round_adapters, const Needed& needed) {
  const auto low = rank_dtype(dy, lora_a, round_adapters);
  const auto [needs_x, needs_weight, needs_a, needs_b, needs_bias] = needed;
  const at::Tensor dy_rows = as_matrix(dy), rows = x ? as_matrix(*x) : at::Tensor();
  const at::Tensor a = lora_a.to(low), b = lora_b.to(low), dy_low = dy_rows.to(low);

  at::Tensor dx, dweight, da, db, dbias;
  const at::Tensor g = at::matmul(dy_low, b) * scaling;
  if (needs_x) {
    dx = at::matmul(dy_rows, weight) + drop(at::matmul(g, a)).to(dy.scalar_type());
    dx = dx.view(with_last_size(dy, weight.size(1)));
  }
  if (needs_weight) dweight = at::matmul(dy_rows.t(), rows);
  if (needs_a) da = at::matmul(g.t(), drop(rows.to(low))).to(lora_a.scalar_type());
  if (needs_b) {
    const at::Tensor h = at::matmul(drop(rows.to(low)), a.t()) * scaling;
    db = at::matmul(dy_low.t(), h).to(lora_b.scalar_type());
  }
  if (needs_bias) dbias = dy_rows.sum(0);
  return {dx, dweight, da, db, dbias};
}

at::Tensor differentiable_add_forward(const at::Tensor& base, const at::Tensor& x,
                                      const at::Tensor& lora_a, const at::Tensor& lora_b,
                                      double scaling, const Mask& drop, bool round_adapters) {
  const auto low = rank_dtype(x, lora_a, round_adapters);
  const at::Tensor h = at::linear(drop(x.to(low)), lora_a.to(low)) * scaling;
  return (base + at::linear(h, lora_b.to(low))).to(base.scalar_type());
}

AddGradients differentiable_add_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                         const at::Tensor& lora_a, const at::Tensor& lora_b,
                                         at::ScalarType dtype, double scaling, const Mask& drop,
                                         bool round_adapters, const AddNeeded& needed) {
  const auto low = rank_dtype(dtype, lora_a, round_adapters);
  const auto [needs_x, needs_a, needs_b] = needed;
  const at::Tensor dy_low = as_matrix(dy).to(low), rows = x ? as_matrix(*x) : at::Tensor();
  const at::Tensor a = lora_a.to(low), b = lora_b.to(low);
  at::Tensor dx, da, db;
  const at::Tensor g = at::matmul(dy_low, b) * scaling;
  if (needs_x) {
    dx = drop(at::matmul(g, a)).to(dtype).view(with_last_size(dy, lora_a.size(1)));
  }
  if (needs_a) da = at::matmul(g.t(), drop(rows.to(low))).to(lora_a.scalar_type());
  if (needs_b) {
    const at::Tensor h = at::matmul(drop(rows.to(low)), a.t()) * scaling;
    db = at::matmul(dy_low.t(), h).to(lora_b.scalar_type());
  }
  return {dx, da, db};
}

}  // namespace fused_lora::composed
