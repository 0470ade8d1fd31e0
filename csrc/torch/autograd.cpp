#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "common/dropout.h"
#include "composed/composed.h"
#include "composed/shapes.h"
#include "torch/checks.h"
#include "torch/ops.h"
#include "torch/packed_weight.h"
#include "torch/path.h"
#include "torch/registration.h"
#include "torch/transforms.h"

namespace fused_lora {
namespace {

using at::Tensor;
using ops::OptionalTensor;
using ops::OptionalTensors;
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

OptionalTensor optional(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// What the op is given beside the tensors that its graph may lead on to: those that do not train,
// too.
struct Rest {
  const Tensor& weight;
  const OptionalTensor &bias, &seed;
  double scaling, dropout_p;
  bool round_adapters;
  int64_t column_offset;
};

// Saves x, h and the seed, and the parameters by reference; of x and h no more than the trainable
// parameters' gradients are made of. Every input, edge and entry costs time at each call, so there
// are none for a weight and a bias that are frozen, nor for what is off.
struct LoRALinearFunction : torch::autograd::Function<LoRALinearFunction> {
  static constexpr bool is_traceable = true;  // compiled autograd may look inside

  static constexpr auto *kScaling = "scaling", *kFlags = "flags";
  static constexpr auto *kDropout = "dropout_p", *kColumnOffset = "column_offset";  // of kDrops
  static constexpr int64_t kTrainsWeight = 1, kTrainsBias = 2, kRounds = 4, kDrops = 8;

  // weight, bias: those that train.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& lora_a,
                        const Tensor& lora_b, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h] = ops::lora_linear_forward(x, rest.weight, lora_a, lora_b, rest.bias, rest.scaling,
                                           rest.dropout_p, rest.seed, rest.round_adapters,
                                           rest.column_offset);
    const bool trains_b = lora_b.requires_grad();
    const bool trains = trains_b || lora_a.requires_grad() || weight;
    ctx->save_for_backward({trains ? x : Tensor(), rest.weight, lora_a, lora_b,
                            trains_b ? h : Tensor(), rest.seed.value_or(Tensor())});
    const bool drops = rest.dropout_p > 0.0;
    const int64_t flags = (weight ? kTrainsWeight : 0) | (bias ? kTrainsBias : 0) |
                          (rest.round_adapters ? kRounds : 0) | (drops ? kDrops : 0);
    auto& data = ctx->saved_data;
    data[kScaling] = rest.scaling;
    if (flags != 0) data[kFlags] = flags;
    if (drops) {
      data[kDropout] = rest.dropout_p;
      data[kColumnOffset] = rest.column_offset;
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor x = optional(saved[0]), h = optional(saved[4]), seed = optional(saved[5]);
    const Tensor &weight = saved[1], &lora_a = saved[2], &lora_b = saved[3];
    const auto& data = ctx->saved_data;
    const double scaling = data.at(kScaling).toDouble();
    const auto found = data.find(kFlags);
    const int64_t flags = found == data.end() ? 0 : found->second.toInt();
    const bool round_adapters = flags & kRounds, drops = flags & kDrops;
    const bool trains_weight = flags & kTrainsWeight, trains_bias = flags & kTrainsBias;
    const double dropout_p = drops ? data.at(kDropout).toDouble() : 0.0;
    const int64_t column_offset = drops ? data.at(kColumnOffset).toInt() : 0;
    // Edges lead to x, A and B, and to those of weight and bias that train.
    const composed::Needed needed = {ctx->needs_input_grad(0),
                                     trains_weight && ctx->needs_input_grad(3),
                                     ctx->needs_input_grad(1), ctx->needs_input_grad(2),
                                     trains_bias && ctx->needs_input_grad(trains_weight ? 4 : 3)};

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
    return {dx, da, db, dweight, dbias, Tensor()};
  }
};

// What the grouped op is given beside the tensors that may be differentiated, and where each of
// those is among them: x, then every weight, every A, every B, and the biases that there are.
struct Group {
  std::vector<OptionalTensor> biases, seeds;
  std::vector<double> scalings, dropout_p;
  bool round_adapters;
  size_t size;

  size_t weight(size_t i) const { return 1 + i; }
  size_t lora_a(size_t i) const { return 1 + size + i; }
  size_t lora_b(size_t i) const { return 1 + 2 * size + i; }
};

// As LoRALinearFunction, of all projections at once: x is saved once, and so are their h, side by
// side. A projection whose y led nowhere has no part in the backward.
struct GroupedFunction : torch::autograd::Function<GroupedFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Group& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const size_t n = group.size;
    const Tensor& x = tensors[0];
    const auto weights = tensors.slice(group.weight(0), n);
    const auto lora_a = tensors.slice(group.lora_a(0), n);
    const auto lora_b = tensors.slice(group.lora_b(0), n);
    auto [ys, h] = ops::lora_linear_grouped_forward(
        x, weights, lora_a, lora_b, OptionalTensors(group.biases), group.scalings, group.dropout_p,
        OptionalTensors(group.seeds), group.round_adapters);

    const auto trains = [](const Tensor& t) { return t.requires_grad(); };
    const bool trains_b = std::any_of(lora_b.begin(), lora_b.end(), trains);
    const bool trains_of_x = std::any_of(lora_a.begin(), lora_a.end(), trains) ||
                             std::any_of(weights.begin(), weights.end(), trains);
    variable_list saved = {trains_b || trains_of_x ? x : Tensor(), trains_b ? h : Tensor()};
    for (size_t i = 1; i < 1 + 3 * n; ++i) saved.push_back(tensors[i]);
    c10::List<bool> has_bias;
    variable_list frozen;
    for (size_t i = 0; i < n; ++i) {
      saved.push_back(group.seeds[i].value_or(Tensor()));
      has_bias.push_back(group.biases[i].has_value());
      const bool grows = trains(x) || trains(weights[i]) || trains(lora_a[i]) ||
                         trains(lora_b[i]) || (group.biases[i] && trains(*group.biases[i]));
      if (!grows) frozen.push_back(ys[i]);
    }
    ctx->mark_non_differentiable(frozen);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_bias"] = has_bias;
    ctx->saved_data["scalings"] = group.scalings;
    ctx->saved_data["dropout_p"] = group.dropout_p;
    ctx->saved_data["round_adapters"] = group.round_adapters;
    return std::move(ys);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Arguments all = arguments(ctx, grads);
    const size_t n = grads.size();
    variable_list gradients(1 + 3 * n + all.biases + 1);  // and nothing for the rest of the group
    if (all.dy.empty()) return gradients;
    if (at::GradMode::is_enabled() || within_torch_func()) {
      differentiable(all, gradients);
      return gradients;
    }
    at::AutoDispatchBelowADInplaceOrView guard;  // past a boxed fallback that has nothing to do
    const auto made = ops::lora_linear_grouped_backward(
        all.dy, all.x, all.weights, all.lora_a, all.lora_b, all.h, all.scalings, all.dropout_p,
        all.seeds, all.round_adapters, all.needed);
    size_t next = 0;
    for (size_t i = 0; i < all.needed.size(); ++i) {
      if (all.needed[i]) gradients[all.places[i]] = made[next++];
    }
    return gradients;
  }

 private:
  // Of the projections that have a dy. places: of each entry of `needed`, among the inputs.
  struct Arguments {
    variable_list dy, weights, lora_a, lora_b;
    OptionalTensor x;
    OptionalTensors h, seeds;
    std::vector<double> scalings, dropout_p;
    bool round_adapters = false;
    c10::List<bool> needed;
    std::vector<size_t> places;
    size_t biases = 0;
  };

  static Arguments arguments(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto scalings = ctx->saved_data["scalings"].toDoubleVector();
    const auto dropout_p = ctx->saved_data["dropout_p"].toDoubleVector();
    const auto has_bias = ctx->saved_data["has_bias"].toBoolList();
    const size_t n = grads.size();
    Arguments all;
    all.x = optional(saved[0]);
    all.round_adapters = ctx->saved_data["round_adapters"].toBool();
    const auto need = [&](bool needed, size_t place) {
      all.needed.push_back(needed);
      all.places.push_back(place);
    };
    need(ctx->needs_input_grad(0), 0);
    int64_t column = 0;
    for (size_t i = 0; i < n; ++i) {
      const Tensor &weight = saved[2 + i], &a = saved[2 + n + i], &b = saved[2 + 2 * n + i];
      const int64_t rank = a.size(0);
      const bool bias = has_bias[i];
      if (grads[i].defined()) {
        all.dy.push_back(grads[i]);
        all.weights.push_back(weight);
        all.lora_a.push_back(a);
        all.lora_b.push_back(b);
        all.h.push_back(saved[1].defined() ? OptionalTensor(saved[1].narrow(1, column, rank))
                                           : std::nullopt);
        all.seeds.push_back(optional(saved[2 + 3 * n + i]));
        all.scalings.push_back(scalings[i]);
        all.dropout_p.push_back(dropout_p[i]);
        for (size_t kind = 0; kind < 3; ++kind) {
          const size_t place = 1 + kind * n + i;
          need(ctx->needs_input_grad(place), place);
        }
        const size_t place = 1 + 3 * n + all.biases;
        need(bias && ctx->needs_input_grad(place), place);
      }
      column += rank;
      all.biases += bias ? 1 : 0;
    }
    return all;
  }

  static void differentiable(const Arguments& all, variable_list& gradients) {
    for (size_t i = 0; i < all.dy.size(); ++i) {
      const auto needs = [&](size_t k) -> bool { return all.needed[1 + 4 * i + k]; };
      const auto [dx, dweight, da, db, dbias] = composed::differentiable_backward(
          all.dy[i], all.x, plain(all.weights[i]), all.lora_a[i], all.lora_b[i], all.scalings[i],
          whole_mask(all.dy[i], all.weights[i], all.lora_a[i], all.dropout_p[i], all.seeds.get(i),
                     all.round_adapters, /*column_offset=*/0),
          all.round_adapters, {all.needed[0], needs(0), needs(1), needs(2), needs(3)});
      if (dx.defined()) gradients[0] = gradients[0].defined() ? gradients[0] + dx : dx;
      const std::array<Tensor, 4> own = {dweight, da, db, dbias};
      for (size_t k = 0; k < 4; ++k) {
        if (needs(k)) gradients[all.places[1 + 4 * i + k]] = own[k];
      }
    }
  }
};

std::vector<Tensor> grouped_below_autograd(const Tensor& x, at::TensorList weights,
                                           at::TensorList lora_a, at::TensorList lora_b,
                                           const OptionalTensors& biases,
                                           at::ArrayRef<double> scalings,
                                           at::ArrayRef<double> dropout_p,
                                           const OptionalTensors& seeds, bool round_adapters) {
  return std::get<0>(ops::lora_linear_grouped_forward(x, weights, lora_a, lora_b, biases, scalings,
                                                      dropout_p, seeds, round_adapters));
}

void check_frozen_if_packed(const Tensor& weight) {
  TORCH_CHECK_VALUE(!is_packed(weight) || !weight.requires_grad(),
                    "lora_linear: weight is packed, and packed weights are frozen: unpack it to "
                    "train it");
}

std::vector<Tensor> grouped_apart(const Tensor& x, at::TensorList weights, at::TensorList lora_a,
                                  at::TensorList lora_b, const OptionalTensors& biases,
                                  at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
                                  const OptionalTensors& seeds, bool round_adapters) {
  checks::grouped_counts(weights, lora_a, lora_b, biases, scalings, dropout_p, seeds);
  std::vector<Tensor> ys;
  for (size_t i = 0; i < weights.size(); ++i) {
    ys.push_back(ops::lora_linear(x, weights[i], lora_a[i], lora_b[i], biases.get(i), scalings[i],
                                  dropout_p[i], seeds.get(i), round_adapters));
  }
  return ys;
}

std::vector<Tensor> grouped_with_autograd(const Tensor& x, at::TensorList weights,
                                          at::TensorList lora_a, at::TensorList lora_b,
                                          const OptionalTensors& biases,
                                          at::ArrayRef<double> scalings,
                                          at::ArrayRef<double> dropout_p,
                                          const OptionalTensors& seeds, bool round_adapters) {
  checks::grouped_counts(weights, lora_a, lora_b, biases, scalings, dropout_p, seeds);
  variable_list tensors = {x};
  for (const auto& list : {weights, lora_a, lora_b}) {
    tensors.insert(tensors.end(), list.begin(), list.end());
  }
  for (const OptionalTensor& bias : biases) {
    if (bias) tensors.push_back(*bias);
  }
  for (const Tensor& weight : weights) check_frozen_if_packed(weight);
  if (within_torch_func() ||
      (within_forward_mode() && std::any_of(tensors.begin(), tensors.end(), has_tangent))) {
    return grouped_apart(x, weights, lora_a, lora_b, biases, scalings, dropout_p, seeds,
                         round_adapters);
  }
  return GroupedFunction::apply(at::TensorList(tensors),
                                Group{biases.vec(), seeds.vec(), scalings.vec(), dropout_p.vec(),
                                      round_adapters, weights.size()});
}

Tensor below_autograd(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                      const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                      double dropout_p, const OptionalTensor& seed, bool round_adapters,
                      int64_t column_offset) {
  return std::get<0>(ops::lora_linear_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p,
                                              seed, round_adapters, column_offset));
}

OptionalTensor if_it_trains(const Tensor& t) {
  return t.requires_grad() ? OptionalTensor(t) : std::nullopt;
}

Tensor with_autograd(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                     const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                     double dropout_p, const OptionalTensor& seed, bool round_adapters,
                     int64_t column_offset) {
  check_frozen_if_packed(weight);
  const auto any_has_tangent = [&] {
    return has_tangent(x) || has_tangent(weight) || has_tangent(lora_a) || has_tangent(lora_b) ||
           (bias && has_tangent(*bias));
  };
  if (within_torch_func() || (within_forward_mode() && any_has_tangent())) {
    return out_of_torchs(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, round_adapters,
                         column_offset);
  }
  const OptionalTensor trained_weight = if_it_trains(weight);
  const OptionalTensor trained_bias = bias ? if_it_trains(*bias) : std::nullopt;
  const bool trains = trained_weight || trained_bias || x.requires_grad() ||
                      lora_a.requires_grad() || lora_b.requires_grad();
  // A node takes as long as the rest of a small call.
  if (!trains || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return below_autograd(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, round_adapters,
                          column_offset);
  }
  return LoRALinearFunction::apply(
      x, lora_a, lora_b, trained_weight, trained_bias,
      Rest{weight, bias, seed, scaling, dropout_p, round_adapters, column_offset});
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("lora_linear", &below_autograd);
  m.impl("lora_linear_grouped", &grouped_below_autograd);
}

// vmap.
TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, FuncTorchBatchedDecomposition, m) {
  m.impl("lora_linear", &out_of_torchs);
  m.impl("lora_linear_grouped", &grouped_apart);
}

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, Autograd, m) {
  m.impl("lora_linear", &with_autograd);
  m.impl("lora_linear_grouped", &grouped_with_autograd);
  // Differentiating one of the halves by hand is an error, not a silent zero.
  m.impl("lora_linear_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_grouped_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_grouped_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fused_lora
