#include <ATen/core/grad_mode.h>
#include <ATen/ops/alias.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/dropout.h"
#include "composed/composed.h"
#include "composed/shapes.h"
#include "torch/any_base/checks.h"
#include "torch/any_base/ops.h"
#include "torch/path.h"
#include "torch/registration.h"
#include "torch/transforms.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// rows: x or dy. dtype: x's.
composed::Mask whole_mask(const Tensor& rows, at::ScalarType dtype, const Tensor& lora_a,
                          double dropout_p, const OptionalTensor& seed, bool round_adapters,
                          int64_t column_offset) {
  if (dropout_p == 0.0) return {};
  const auto low = composed::rank_dtype(dtype, lora_a, round_adapters);
  return {ops::dropout_mask(*seed, composed::sym_rows(rows), lora_a.sym_size(1), dropout_p,
                            /*row_offset=*/0, column_offset, low),
          DropoutRule::from_probability(dropout_p).scale};
}

// Out of torch's own operations, which torch knows how to transform.
Tensor out_of_torchs(const Tensor& base, const Tensor& x, const Tensor& lora_a,
                     const Tensor& lora_b, double scaling, double dropout_p,
                     const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  TORCH_CHECK(asked_path() != Path::kFused,
              "lora_add: path 'fused' was asked for, but torch's own operations compute under "
              "transforms of torch.func and for forward-mode derivatives");
  checks::add_forward_arguments(base, x, lora_a, lora_b, dropout_p, seed, column_offset);
  const auto drop =
      whole_mask(x, x.scalar_type(), lora_a, dropout_p, seed, round_adapters, column_offset);
  return composed::differentiable_add_forward(base, x, lora_a, lora_b, scaling, drop,
                                              round_adapters);
}

// As lora_linear's (torch/autograd.cpp): of x and h no more is saved than gradients are made of,
// and of base nothing: its gradient is y's.
struct AddFunction : torch::autograd::Function<AddFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& base, const Tensor& x,
                        const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& seed,
                        double scaling, double dropout_p, bool round_adapters,
                        int64_t column_offset, bool in_place) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor y = base, h;
    if (in_place) {
      h = ops::lora_add_forward_(y, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters,
                                 column_offset);
      ctx->mark_dirty({y});
    } else {
      std::tie(y, h) = ops::lora_add_forward(base, x, lora_a, lora_b, scaling, dropout_p, seed,
                                             round_adapters, column_offset);
    }
    const bool trains_b = lora_b.requires_grad();
    const bool trains = trains_b || lora_a.requires_grad();
    ctx->save_for_backward(
        {trains ? x : Tensor(), lora_a, lora_b, trains_b ? h : Tensor(), seed.value_or(Tensor())});
    ctx->saved_data["dtype"] = static_cast<int64_t>(x.scalar_type());
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["round_adapters"] = round_adapters;
    ctx->saved_data["column_offset"] = column_offset;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor x = optional(saved[0]), h = optional(saved[3]), seed = optional(saved[4]);
    const Tensor &lora_a = saved[1], &lora_b = saved[2], &dy = grads[0];
    auto& data = ctx->saved_data;
    const auto dtype = static_cast<at::ScalarType>(data["dtype"].toInt());
    const double scaling = data["scaling"].toDouble(), dropout_p = data["dropout_p"].toDouble();
    const bool round_adapters = data["round_adapters"].toBool();
    const int64_t column_offset = data["column_offset"].toInt();
    const composed::AddNeeded needed = {ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                        ctx->needs_input_grad(3)};
    const auto gradients = [&] {
      // As lora_linear's: a graph of the backward itself, or a batch of gradients.
      if (at::GradMode::is_enabled() || within_torch_func()) {
        return composed::differentiable_add_backward(
            dy, x, lora_a, lora_b, dtype, scaling,
            whole_mask(dy, dtype, lora_a, dropout_p, seed, round_adapters, column_offset),
            round_adapters, needed);
      }
      at::AutoDispatchBelowADInplaceOrView guard;  // past a boxed fallback that has nothing to do
      return ops::lora_add_backward(dy, x, lora_a, lora_b, h, dtype, scaling, dropout_p, seed,
                                    round_adapters, needed, column_offset);
    };
    const auto [dx, da, db] = gradients();
    return {dy, dx, da, db, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct NoViewFunction : torch::autograd::Function<NoViewFunction> {
  static Tensor forward(AutogradContext* /*ctx*/, const Tensor& view) {
    at::AutoDispatchBelowADInplaceOrView guard;  // where views are not kept account of
    return at::alias(view);
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& grads) {
    return grads;
  }
};

Tensor below_autograd(const Tensor& base, const Tensor& x, const Tensor& lora_a,
                      const Tensor& lora_b, double scaling, double dropout_p,
                      const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  return std::get<0>(ops::lora_add_forward(base, x, lora_a, lora_b, scaling, dropout_p, seed,
                                           round_adapters, column_offset));
}

Tensor& below_autograd_(Tensor& base, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                        double scaling, double dropout_p, const OptionalTensor& seed,
                        bool round_adapters, int64_t column_offset) {
  ops::lora_add_forward_(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters,
                         column_offset);
  return base;
}

bool is_transformed(const Tensor& base, const Tensor& x, const Tensor& lora_a,
                    const Tensor& lora_b) {
  return within_torch_func() || has_tangent(base) || has_tangent(x) || has_tangent(lora_a) ||
         has_tangent(lora_b);
}

Tensor with_autograd(const Tensor& base, const Tensor& x, const Tensor& lora_a,
                     const Tensor& lora_b, double scaling, double dropout_p,
                     const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  if (is_transformed(base, x, lora_a, lora_b)) {
    return out_of_torchs(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters,
                         column_offset);
  }
  if (!torch::autograd::compute_requires_grad(base, x, lora_a, lora_b)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return below_autograd(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters,
                          column_offset);
  }
  return AddFunction::apply(base, x, lora_a, lora_b, seed, scaling, dropout_p, round_adapters,
                            column_offset, /*in_place=*/false);
}

Tensor& with_autograd_(Tensor& base, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                       double scaling, double dropout_p, const OptionalTensor& seed,
                       bool round_adapters, int64_t column_offset) {
  const bool requires_grad = torch::autograd::compute_requires_grad(base, x, lora_a, lora_b);
  torch::autograd::check_inplace(base, requires_grad);  // before anything is written
  if (is_transformed(base, x, lora_a, lora_b)) {
    return base.copy_(out_of_torchs(base, x, lora_a, lora_b, scaling, dropout_p, seed,
                                    round_adapters, column_offset));
  }
  if (requires_grad) {
    AddFunction::apply(base, x, lora_a, lora_b, seed, scaling, dropout_p, round_adapters,
                       column_offset, /*in_place=*/true);
    return base;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  below_autograd_(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters, column_offset);
  torch::autograd::increment_version(base);
  return base;
}

}  // namespace

Tensor ops::as_no_view(const Tensor& view) {
  const Tensor own = NoViewFunction::apply(view);
  // Not before: of a view whose memory has changed, torch asks where its gradient goes once more.
  if (!view.is_inference()) view.unsafeGetTensorImpl()->bump_version();
  return own;
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("lora_add", &below_autograd);
  m.impl("lora_add_", &below_autograd_);
}

// vmap.
TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, FuncTorchBatchedDecomposition, m) {
  m.impl("lora_add", &out_of_torchs);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, Autograd, m) {
  m.impl("lora_add", &with_autograd);
  m.impl("lora_add_", &with_autograd_);
  // Differentiating one of the halves by hand is an error, not a silent zero.
  m.impl("lora_add_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_add_forward_", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_add_backward", torch::autograd::autogradNotImplementedFallback());
}

// Counts what is written as a new version of base.
TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, ADInplaceOrView, m) {
  m.impl("lora_add_", torch::autograd::autogradNotImplementedInplaceOrViewFallback());
  m.impl("lora_add_forward_", torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}

}  // namespace fused_lora
