#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>

#include "composed/mixed_batch.h"
#include "torch/mixed_batch/ops.h"
#include "torch/packed_weight.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor draw_mask(const Tensor& seed, int64_t rows, int64_t columns, double p, int64_t row_offset,
                 int64_t column_offset, at::ScalarType dtype) {
  return ops::dropout_mask(seed, rows, columns, p, row_offset, column_offset, dtype);
}

bool any_trains(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t.requires_grad(); });
}

// As lora_linear's (torch/autograd.cpp): of x and h no more is saved than gradients are made of.
struct MixedFunction : torch::autograd::Function<MixedFunction> {
  static constexpr bool is_traceable = true;

  // Gradients go to x, weight, every A, every B and bias, in this order.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        at::TensorList lora_a, at::TensorList lora_b, const OptionalTensor& bias,
                        const Tensor& adapter_index, const OptionalTensor& seed,
                        const std::vector<double>& scaling, double dropout_p, bool round_adapters) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h] = ops::lora_linear_mixed_forward(x, weight, lora_a, lora_b, adapter_index, bias,
                                                 scaling, dropout_p, seed, round_adapters);
    const bool trains_b = any_trains(lora_b);
    const bool trains = trains_b || any_trains(lora_a) || weight.requires_grad();
    variable_list saved = {trains ? x : Tensor(), weight, adapter_index, trains_b ? h : Tensor(),
                           seed.value_or(Tensor())};
    saved.insert(saved.end(), lora_a.begin(), lora_a.end());
    saved.insert(saved.end(), lora_b.begin(), lora_b.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["round_adapters"] = round_adapters;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kSaved = 5, kBeforeAdapters = 2;
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const OptionalTensor x = optional(saved[0]), h = optional(saved[3]), seed = optional(saved[4]);
    const Tensor &weight = saved[1], &adapter_index = saved[2];
    const size_t count = (saved.size() - kSaved) / 2;
    const at::TensorList adapters = at::TensorList(saved).slice(kSaved);
    const at::TensorList lora_a = adapters.slice(0, count), lora_b = adapters.slice(count);
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const std::vector<double> scaling = ctx->saved_data["scaling"].toDoubleVector();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const bool round_adapters = ctx->saved_data["round_adapters"].toBool();

    composed::MixedNeeded needed;
    needed.x = ctx->needs_input_grad(0);
    needed.weight = ctx->needs_input_grad(1);
    needed.bias = has_bias && ctx->needs_input_grad(kBeforeAdapters + 2 * count);
    for (size_t i = 0; i < count; ++i) {
      needed.a.push_back(ctx->needs_input_grad(kBeforeAdapters + i));
      needed.b.push_back(ctx->needs_input_grad(kBeforeAdapters + count + i));
    }

    variable_list made(2);
    Tensor dbias;
    // Grad mode is on in a backward only where its own graph is wanted (create_graph).
    if (at::GradMode::is_enabled()) {
      const Tensor rows = composed::index_of_rows(adapter_index, grads[0]);
      const composed::MixedGradients g = composed::mixed_backward(
          grads[0], x, plain(weight), {lora_a, lora_b, scaling, rows}, std::nullopt,
          composed::Dropout(dropout_p, seed, draw_mask), round_adapters, needed);
      made[0] = g.x;
      made[1] = g.weight;
      dbias = g.bias;
      made.insert(made.end(), g.a.begin(), g.a.end());
      made.insert(made.end(), g.b.begin(), g.b.end());
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;  // past a boxed fallback that has nothing to do
      c10::List<bool> needed_a, needed_b;
      for (size_t i = 0; i < count; ++i) {
        needed_a.push_back(needed.a[i]);
        needed_b.push_back(needed.b[i]);
      }
      auto [dx, dweight, db, da, db_each] = ops::lora_linear_mixed_backward(
          grads[0], x, weight, lora_a, lora_b, adapter_index, h, scaling, dropout_p, seed,
          round_adapters, {needed.x, needed.weight, needed.bias}, needed_a, needed_b);
      made[0] = dx;
      made[1] = dweight;
      dbias = db;
      for (size_t i = 0; i < count; ++i) made.push_back(needed.a[i] ? da[i] : Tensor());
      for (size_t i = 0; i < count; ++i) made.push_back(needed.b[i] ? db_each[i] : Tensor());
    }
    made.push_back(dbias);
    // adapter_index, seed, scaling, dropout_p and round_adapters have none.
    made.resize(made.size() + 5);
    return made;
  }
};

Tensor below_autograd(const Tensor& x, const Tensor& weight, at::TensorList lora_a,
                      at::TensorList lora_b, const Tensor& adapter_index,
                      const OptionalTensor& bias, at::ArrayRef<double> scaling, double dropout_p,
                      const OptionalTensor& seed, bool round_adapters) {
  return std::get<0>(ops::lora_linear_mixed_forward(x, weight, lora_a, lora_b, adapter_index, bias,
                                                    scaling, dropout_p, seed, round_adapters));
}

Tensor with_autograd(const Tensor& x, const Tensor& weight, at::TensorList lora_a,
                     at::TensorList lora_b, const Tensor& adapter_index, const OptionalTensor& bias,
                     at::ArrayRef<double> scaling, double dropout_p, const OptionalTensor& seed,
                     bool round_adapters) {
  TORCH_CHECK_VALUE(!is_packed(weight) || !weight.requires_grad(),
                    "lora_linear: weight is packed, and packed weights are frozen: unpack it to "
                    "train it");
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return below_autograd(x, weight, lora_a, lora_b, adapter_index, bias, scaling, dropout_p, seed,
                          round_adapters);
  }
  return MixedFunction::apply(x, weight, lora_a, lora_b, bias, adapter_index, seed, scaling.vec(),
                              dropout_p, round_adapters);
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("lora_linear_mixed", &below_autograd);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, Autograd, m) {
  m.impl("lora_linear_mixed", &with_autograd);
  // Differentiating one of the halves by hand is an error, not a silent zero.
  m.impl("lora_linear_mixed_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_mixed_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fused_lora
