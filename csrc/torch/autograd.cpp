#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "common/dropout.h"
#include "composed/composed.h"
#include "composed/shapes.h"
#include "torch/checks.h"
#include "torch/ops.h"
#include "torch/packed_weight.h"
#include "torch/path.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// rows: x or dy.
composed::Mask whole_mask(const Tensor& rows, const Tensor& weight, const Tensor& lora_a,
                          double dropout_p, const OptionalTensor& seed, bool round_adapters,
                          int64_t column_offset) {
  if (dropout_p == 0.0) return {};
  const auto low = composed::rank_dtype(rows, lora_a, round_adapters);
  return {ops::dropout_mask(*seed, composed::sym_rows(rows), sym_in_features(weight), dropout_p,
                            /*row_offset=*/0, column_offset, low),
          DropoutRule::from_probability(dropout_p).scale};
}

// Out of torch's own operations, which torch knows how to transform.
Tensor out_of_torchs(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                     const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                     double dropout_p, const OptionalTensor& seed, bool round_adapters,
                     int64_t column_offset) {
  TORCH_CHECK(asked_path() != Path::kFused,
              "lora_linear: path 'fused' was asked for, but torch's own operations compute under "
              "transforms of torch.func and for forward-mode derivatives");
  checks::forward_arguments(x, weight, lora_a, lora_b, bias, dropout_p, seed, column_offset);
  const auto drop = whole_mask(x, weight, lora_a, dropout_p, seed, round_adapters, column_offset);
  return composed::differentiable_forward(x, plain(weight), lora_a, lora_b, bias, scaling, drop,
                                          round_adapters);
}

// torch includes the key while there is a transform to apply, and takes it away around what the
// last one has been applied to.
bool within_torch_func() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Saves x, h and the seed, and the parameters by reference; of x and h no more than the trainable
// parameters' gradients are made of.
struct LoRALinearFunction : torch::autograd::Function<LoRALinearFunction> {
  static constexpr bool is_traceable = true;  // compiled autograd may look inside

  static constexpr auto *kScaling = "scaling", *kDropout = "dropout_p";
  static constexpr auto *kHasBias = "has_bias", *kRounds = "round_adapters";
  static constexpr auto* kColumnOffset = "column_offset";

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& bias,
                        const OptionalTensor& seed, double scaling, double dropout_p,
                        bool round_adapters, int64_t column_offset) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h] = ops::lora_linear_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p,
                                           seed, round_adapters, column_offset);
    const bool trains_b = lora_b.requires_grad();
    const bool trains = trains_b || lora_a.requires_grad() || weight.requires_grad();
    ctx->save_for_backward({trains ? x : Tensor(), weight, lora_a, lora_b, trains_b ? h : Tensor(),
                            seed.value_or(Tensor())});
    // Entries cost time, so what is off has none.
    ctx->saved_data[kScaling] = scaling;
    if (dropout_p > 0.0) ctx->saved_data[kDropout] = dropout_p;
    if (bias) ctx->saved_data[kHasBias] = true;
    if (round_adapters) ctx->saved_data[kRounds] = true;
    if (column_offset != 0) ctx->saved_data[kColumnOffset] = column_offset;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const OptionalTensor x = optional(saved[0]), h = optional(saved[4]), seed = optional(saved[5]);
    const Tensor &weight = saved[1], &lora_a = saved[2], &lora_b = saved[3];
    const auto& data = ctx->saved_data;
    const double scaling = data.at(kScaling).toDouble();
    const auto dropout = data.find(kDropout);
    const double dropout_p = dropout == data.end() ? 0.0 : dropout->second.toDouble();
    const bool has_bias = data.count(kHasBias) > 0;
    const bool round_adapters = data.count(kRounds) > 0;
    const auto offset = data.find(kColumnOffset);
    const int64_t column_offset = offset == data.end() ? 0 : offset->second.toInt();
    const composed::Needed needed = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     ctx->needs_input_grad(2), ctx->needs_input_grad(3),
                                     has_bias && ctx->needs_input_grad(4)};

    // Grad mode is on in a backward only where its own graph is wanted (create_graph); within a
    // transform it computes a batch of gradients (is_grads_batched).
    const auto gradients = [&] {
      if (at::GradMode::is_enabled() || within_torch_func()) {
        return composed::differentiable_backward(
            grads[0], x, plain(weight), lora_a, lora_b, scaling,
            whole_mask(grads[0], weight, lora_a, dropout_p, seed, round_adapters, column_offset),
            round_adapters, needed);
      }
      at::AutoDispatchBelowADInplaceOrView guard;  // past a boxed fallback that has nothing to do
      return ops::lora_linear_backward(grads[0], x, weight, lora_a, lora_b, h, scaling, dropout_p,
                                       seed, round_adapters, needed, column_offset);
    };
    const auto [dx, dweight, da, db, dbias] = gradients();
    return {dx, dweight, da, db, dbias, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor below_autograd(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                      const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                      double dropout_p, const OptionalTensor& seed, bool round_adapters,
                      int64_t column_offset) {
  return std::get<0>(ops::lora_linear_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p,
                                              seed, round_adapters, column_offset));
}

Tensor with_autograd(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                     const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                     double dropout_p, const OptionalTensor& seed, bool round_adapters,
                     int64_t column_offset) {
  TORCH_CHECK_VALUE(!is_packed(weight) || !weight.requires_grad(),
                    "lora_linear: weight is packed, and packed weights are frozen: unpack it to "
                    "train it");
  using torch::autograd::isFwGradDefined;
  if (within_torch_func() || isFwGradDefined(x) || isFwGradDefined(weight) ||
      isFwGradDefined(lora_a) || isFwGradDefined(lora_b) || isFwGradDefined(bias)) {
    return out_of_torchs(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, round_adapters,
                         column_offset);
  }
  return LoRALinearFunction::apply(x, weight, lora_a, lora_b, bias, seed, scaling, dropout_p,
                                   round_adapters, column_offset);
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", &below_autograd);
}

// vmap.
TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, FuncTorchBatchedDecomposition, m) {
  m.impl("lora_linear", &out_of_torchs);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, Autograd, m) {
  m.impl("lora_linear", &with_autograd);
  // Differentiating one of the halves by hand is an error, not a silent zero.
  m.impl("lora_linear_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fused_lora
