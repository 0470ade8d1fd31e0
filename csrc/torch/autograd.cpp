#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "composed/composed.h"
#include "torch/ops.h"
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

// Saves x, h and the seed, and the parameters by reference; of x and h no more than the trainable
// parameters' gradients are made of.
struct LoRALinearFunction : torch::autograd::Function<LoRALinearFunction> {
  static constexpr bool is_traceable = true;  // compiled autograd may look inside

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& bias,
                        const OptionalTensor& seed, double scaling, double dropout_p,
                        bool round_adapters) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h] = ops::lora_linear_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p,
                                           seed, round_adapters);
    const bool trains_b = lora_b.requires_grad();
    const bool trains = trains_b || lora_a.requires_grad() || weight.requires_grad();
    ctx->save_for_backward({trains ? x : Tensor(), weight, lora_a, lora_b, trains_b ? h : Tensor(),
                            seed.value_or(Tensor())});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["round_adapters"] = round_adapters;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const OptionalTensor x = optional(saved[0]), h = optional(saved[4]), seed = optional(saved[5]);
    const Tensor &weight = saved[1], &lora_a = saved[2], &lora_b = saved[3];
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const bool round_adapters = ctx->saved_data["round_adapters"].toBool();
    const composed::Needed needed = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     ctx->needs_input_grad(2), ctx->needs_input_grad(3),
                                     has_bias && ctx->needs_input_grad(4)};

    // Grad mode is on in a backward only where its own graph is wanted (create_graph).
    const auto gradients = [&] {
      if (at::GradMode::is_enabled()) {
        return composed::differentiable_backward(
            grads[0], x, plain(weight), lora_a, lora_b, scaling,
            composed::Dropout(dropout_p, seed, draw_mask), round_adapters, needed);
      }
      at::AutoDispatchBelowADInplaceOrView guard;  // past a boxed fallback that has nothing to do
      return ops::lora_linear_backward(grads[0], x, weight, lora_a, lora_b, h, scaling, dropout_p,
                                       seed, round_adapters, needed);
    };
    const auto [dx, dweight, da, db, dbias] = gradients();
    return {dx, dweight, da, db, dbias, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor below_autograd(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                      const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                      double dropout_p, const OptionalTensor& seed, bool round_adapters) {
  return std::get<0>(ops::lora_linear_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p,
                                              seed, round_adapters));
}

Tensor with_autograd(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                     const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                     double dropout_p, const OptionalTensor& seed, bool round_adapters) {
  TORCH_CHECK_VALUE(!is_packed(weight) || !weight.requires_grad(),
                    "lora_linear: weight is packed, and packed weights are frozen: unpack it to "
                    "train it");
  return LoRALinearFunction::apply(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p,
                                   round_adapters);
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", &below_autograd);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, Autograd, m) {
  m.impl("lora_linear", &with_autograd);
  // Differentiating one of the halves by hand is an error, not a silent zero.
  m.impl("lora_linear_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fused_lora
