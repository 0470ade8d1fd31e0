#include "composed/composed.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "composed/shapes.h"

namespace fused_lora::composed {
namespace {

// out = α · rows · factorᵀ, a long operand against a thin one. factor: r×C, out: M×r.
void rank_down(const Rows& rows, const at::Tensor& factor, double alpha, at::Tensor out) {
  const at::Tensor transposed = factor.t();
  const auto block = [&](int64_t row, int64_t n) {
    at::Tensor part = n == rows.count() ? out : out.narrow(0, row, n);
    at::addmm_out(part, part, rows.block(row, n), transposed, /*beta=*/0, alpha * rows.scale());
  };
  for_each_row_block(rows.device(), rows.count(), rows.columns(), rows.as_it_lies(), block);
}

at::Tensor rank_down(const Rows& rows, const at::Tensor& factor, double alpha) {
  at::Tensor out = at::empty({rows.count(), factor.size(0)}, factor.options());
  rank_down(rows, factor, alpha, out);
  return out;
}

// into += low · factor, under the dropout mask where there is one.
// low: M×r, factor: r×C, into: M×C.
void accumulate_rank_up(const at::Tensor& into, const at::Tensor& low, const at::Tensor& factor,
                        const Dropout* dropout = nullptr) {
  const bool masked = dropout != nullptr && dropout->active();
  const int64_t m = into.size(0), columns = into.size(1);
  if (!masked && into.scalar_type() == low.scalar_type()) {
    into.addmm_(low, factor);
    return;
  }
  for_each_row_block(into.device(), m, columns, /*whole=*/false, [&](int64_t row, int64_t n) {
    at::Tensor delta = at::mm(low.narrow(0, row, n), factor);
    if (masked) delta.mul_(dropout->mask(row, n, columns, delta.scalar_type()));
    into.narrow(0, row, n).add_(delta, masked ? dropout->scale : 1.0);
  });
}

// leftᵀ · right, reduced over the M rows that both have.
// Returns left.columns × right.columns in `dtype`.
at::Tensor rank_grad(const Rows& left, const Rows& right, at::ScalarType dtype) {
  if (left.as_it_lies() && right.as_it_lies()) {
    return at::mm(left.block(0, left.count()).t(), right.block(0, right.count())).to(dtype);
  }
  // Blocks' partial sums add up in fp32 (fp64 in fp64) and are rounded once.
  const auto wide = at::promoteTypes(at::kFloat, left.dtype());
  at::Tensor sum = at::zeros({left.columns(), right.columns()}, left.options().dtype(wide));
  const int64_t longest = std::max(left.columns(), right.columns());
  const double scale = left.scale() * right.scale();
  const auto add = [&](int64_t row, int64_t n) {
    sum.add_(at::mm(left.block(row, n).t(), right.block(row, n)), scale);
  };
  for_each_row_block(left.device(), left.count(), longest, /*whole=*/false, add);
  return sum.to(dtype);
}

}  // namespace

at::ScalarType rank_dtype(at::ScalarType rows, const at::Tensor& lora_a, bool round_adapters) {
  return round_adapters ? rows : lora_a.scalar_type();
}

at::ScalarType rank_dtype(const at::Tensor& rows, const at::Tensor& lora_a, bool round_adapters) {
  return rank_dtype(rows.scalar_type(), lora_a, round_adapters);
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight,
                                           const at::Tensor& lora_a, const at::Tensor& lora_b,
                                           const std::optional<at::Tensor>& bias, double scaling,
                                           const Dropout& dropout, bool round_adapters) {
  const auto low = rank_dtype(x, lora_a, round_adapters);
  const at::Tensor rows = as_matrix(x);
  at::Tensor y = bias ? at::addmm(*bias, rows, weight.t()) : at::mm(rows, weight.t());
  const at::Tensor h = rank_down(Rows(rows, low, &dropout), lora_a.to(low), scaling);
  accumulate_rank_up(y, h, lora_b.to(low).t());
  return {x.dim() == 2 ? y : y.view(with_last_size(x, weight.size(0))), h};
}

std::tuple<std::vector<at::Tensor>, at::Tensor> forward(const at::Tensor& rows,
                                                        const std::vector<Projection>& projections,
                                                        bool round_adapters) {
  const Projection& first = projections.front();
  const auto low = rank_dtype(rows, first.lora_a, round_adapters);
  int64_t ranks = 0;
  bool alike = true;
  std::vector<at::Tensor> stacked;
  for (const Projection& p : projections) {
    ranks += p.lora_a.size(0);
    alike = alike && p.scaling == first.scaling && !p.dropout.active();
    stacked.push_back(p.lora_a.to(low));
  }
  at::Tensor h = at::empty({rows.size(0), ranks}, rows.options().dtype(low));
  if (alike) rank_down(Rows(rows, low), at::cat(stacked), first.scaling, h);

  std::vector<at::Tensor> ys;
  int64_t column = 0;
  for (size_t i = 0; i < projections.size(); ++i) {
    const Projection& p = projections[i];
    const at::Tensor part = h.narrow(1, column, p.lora_a.size(0));
    if (!alike) rank_down(Rows(rows, low, &p.dropout), stacked[i], p.scaling, part);
    const at::Tensor transposed = p.weight.t();
    ys.push_back(p.bias ? at::addmm(*p.bias, rows, transposed) : at::mm(rows, transposed));
    accumulate_rank_up(ys.back(), part, p.lora_b.to(low).t());
    column += p.lora_a.size(0);
  }
  return {std::move(ys), h};
}

Gradients backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                   const at::Tensor& weight, const at::Tensor& lora_a, const at::Tensor& lora_b,
                   const std::optional<at::Tensor>& h, double scaling, const Dropout& dropout,
                   bool round_adapters, const Needed& needed, const at::Tensor& dx_sum) {
  const auto low = rank_dtype(dy, lora_a, round_adapters);
  const auto [needs_x, needs_weight, needs_a, needs_b, needs_bias] = needed;
  const at::Tensor dy_rows = as_matrix(dy);
  const at::Tensor rows = needs_weight || needs_a ? as_matrix(*x) : at::Tensor();
  at::Tensor dx, dweight, da, db, dbias;

  at::Tensor g;
  if (needs_x || needs_a) {
    g = rank_down(Rows(dy_rows, low), lora_b.to(low).t(), scaling);
  }
  if (needs_x) {
    dx = dx_sum.defined() ? as_matrix(dx_sum).addmm_(dy_rows, weight) : at::mm(dy_rows, weight);
    accumulate_rank_up(dx, g, lora_a.to(low), &dropout);
    if (dy.dim() != 2) dx = dx.view(with_last_size(dy, weight.size(1)));
  }
  if (needs_a) da = rank_grad(Rows(g, low), Rows(rows, low, &dropout), lora_a.scalar_type());
  if (needs_b) db = rank_grad(Rows(dy_rows, low), Rows(*h, low), lora_b.scalar_type());
  if (needs_weight) dweight = at::mm(dy_rows.t(), rows);
  if (needs_bias) dbias = dy_rows.sum(0);
  return {dx, dweight, da, db, dbias};
}

at::Tensor add_forward(const at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, double scaling, const Dropout& dropout,
                       bool round_adapters) {
  const auto low = rank_dtype(x, lora_a, round_adapters);
  const at::Tensor rows = as_matrix(x);
  at::Tensor h = rank_down(Rows(rows, low, &dropout), lora_a.to(low), scaling);
  accumulate_rank_up(base, h, lora_b.to(low).t());
  return h;
}

AddGradients add_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                          const at::Tensor& lora_a, const at::Tensor& lora_b,
                          const std::optional<at::Tensor>& h, at::ScalarType dtype, double scaling,
                          const Dropout& dropout, bool round_adapters, const AddNeeded& needed) {
  const auto low = rank_dtype(dtype, lora_a, round_adapters);
  const auto [needs_x, needs_a, needs_b] = needed;
  const at::Tensor dy_rows = as_matrix(dy);
  at::Tensor dx, da, db, g;
  if (needs_x || needs_a) g = rank_down(Rows(dy_rows, low), lora_b.to(low).t(), scaling);
  if (needs_x) {
    dx = at::zeros({dy_rows.size(0), lora_a.size(1)}, dy.options().dtype(dtype));
    accumulate_rank_up(dx, g, lora_a.to(low), &dropout);
    if (dy.dim() != 2) dx = dx.view(with_last_size(dy, lora_a.size(1)));
  }
  if (needs_a) {
    const at::Tensor rows = as_matrix(*x);
    da = rank_grad(Rows(g, low), Rows(rows, low, &dropout), lora_a.scalar_type());
  }
  if (needs_b) db = rank_grad(Rows(dy_rows, low), Rows(*h, low), lora_b.scalar_type());
  return {dx, da, db};
}

}  // namespace fused_lora::composed
