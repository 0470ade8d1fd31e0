// The grouped ops on a backend: projections of one x. Each projection's path is chosen as it would
// be by itself. Where all take the kernels, and the backend can, their calls are launched together;
// where none does, composed computes them together; else each is computed by itself.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <deque>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "torch/run.h"

namespace fused_lora {

template <typename Backend>
struct GroupedOps {
  using ForwardCall = typename Backend::ForwardCall;
  using BackwardCall = typename Backend::BackwardCall;
  template <typename Call>
  static constexpr bool kTogether =
      requires(const Backend& backend, std::span<Call> calls) { backend.launch_together(calls); };

  static std::tuple<std::vector<at::Tensor>, at::Tensor> forward(
      const at::Tensor& x, at::TensorList weights, at::TensorList lora_a, at::TensorList lora_b,
      const ops::OptionalTensors& biases, at::ArrayRef<double> scalings,
      at::ArrayRef<double> dropout_p, const ops::OptionalTensors& seeds, bool round_adapters) {
    checks::grouped_forward_arguments(x, weights, lora_a, lora_b, biases, scalings, dropout_p,
                                      seeds);
    const c10::DeviceGuard guard(x.device());
    const at::Tensor rows = composed::as_matrix(x);
    const auto parameters =
        parameters_of(weights, lora_a, lora_b, scalings, dropout_p, seeds, round_adapters);
    const std::vector<ops::OptionalTensor> each_bias = biases.vec();
    auto [ys, h] = forward_of_rows(rows, parameters, each_bias);
    if (x.dim() != 2) {
      for (at::Tensor& y : ys) y = y.view(composed::with_last_size(x, y.size(1)));
    }
    return {std::move(ys), h};
  }

  static std::vector<at::Tensor> backward(at::TensorList dy, const ops::OptionalTensor& x,
                                          at::TensorList weights, at::TensorList lora_a,
                                          at::TensorList lora_b, const ops::OptionalTensors& h,
                                          at::ArrayRef<double> scalings,
                                          at::ArrayRef<double> dropout_p,
                                          const ops::OptionalTensors& seeds, bool round_adapters,
                                          const c10::List<bool>& needed) {
    checks::grouped_backward_arguments(dy, x, weights, lora_a, lora_b, h, scalings, dropout_p,
                                       seeds, round_adapters, needed);
    const c10::DeviceGuard guard(dy[0].device());
    const auto parameters =
        parameters_of(weights, lora_a, lora_b, scalings, dropout_p, seeds, round_adapters);
    const std::vector<ops::OptionalTensor> each_h = h.vec();
    ops::OptionalTensor rows;
    if (x) rows = composed::as_matrix(*x);
    std::vector<at::Tensor> dys;
    std::vector<composed::Needed> each_needed;
    for (size_t i = 0; i < dy.size(); ++i) {
      dys.push_back(composed::as_matrix(dy[i]));
      const auto needs = [&](size_t k) -> bool { return needed[1 + 4 * i + k]; };
      each_needed.push_back({needed[0], needs(0), needs(1), needs(2), needs(3)});
    }
    const auto made = backward_of_rows(dys, rows, each_h, parameters, each_needed);

    std::vector<at::Tensor> flat;
    for (size_t i = 0; i < made.size(); ++i) {
      const auto& [dx, dweight, da, db, dbias] = made[i];
      if (i == 0 && dx.defined())
        flat.push_back(dx.view(composed::with_last_size(dy[0], dx.size(1))));
      for (const at::Tensor& gradient : {dweight, da, db, dbias}) {
        if (gradient.defined()) flat.push_back(gradient);
      }
    }
    return flat;
  }

 private:
  static std::vector<Parameters> parameters_of(at::TensorList weights, at::TensorList lora_a,
                                               at::TensorList lora_b, at::ArrayRef<double> scalings,
                                               at::ArrayRef<double> dropout_p,
                                               const ops::OptionalTensors& seeds,
                                               bool round_adapters) {
    std::vector<Parameters> all;
    all.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      all.push_back({weights[i], lora_a[i], lora_b[i], scalings[i],
                     composed::Dropout(dropout_p[i], seeds.get(i), Backend::mask), round_adapters});
    }
    return all;
  }

  static std::tuple<std::vector<at::Tensor>, at::Tensor> forward_of_rows(
      const at::Tensor& rows, const std::vector<Parameters>& parameters,
      const std::vector<ops::OptionalTensor>& biases) {
    const Path asked = asked_path();
    std::deque<Forward<Backend>> members;
    size_t by_kernels = 0;
    if (may_take_kernels<Backend>(asked, rows)) {
      for (size_t i = 0; i < parameters.size(); ++i) {
        members.emplace_back(rows, parameters[i], biases[i]);
        by_kernels += members.back().takes_kernels(asked) ? 1 : 0;
      }
    }
    if (by_kernels == 0) {
      std::vector<composed::Projection> projections;
      for (size_t i = 0; i < parameters.size(); ++i) {
        const Parameters& p = parameters[i];
        projections.push_back(
            {plain(p.weight), p.lora_a, p.lora_b, biases[i], p.scaling, p.dropout});
      }
      return composed::forward(rows, projections, parameters[0].round_adapters);
    }
    std::vector<at::Tensor> ys, hs;
    if constexpr (kTogether<ForwardCall>) {
      if (by_kernels == members.size()) {
        const auto& first = parameters[0];
        const auto low = composed::rank_dtype(rows, first.lora_a, first.round_adapters);
        int64_t ranks = 0;
        for (const Parameters& p : parameters) ranks += p.lora_a.size(0);
        const at::Tensor h = at::empty({rows.size(0), ranks}, rows.options().dtype(low));
        std::vector<ForwardCall> calls;
        int64_t column = 0;
        for (size_t i = 0; i < members.size(); ++i) {
          const int64_t rank = parameters[i].lora_a.size(0);
          calls.push_back(members[i].into(h.narrow(1, column, rank)));
          ys.push_back(members[i].y());
          column += rank;
        }
        Backend(rows).launch_together(calls);
        return {std::move(ys), h};
      }
    }
    for (auto& member : members) {
      auto [y, h] = member(asked);
      ys.push_back(y);
      hs.push_back(h);
    }
    return {std::move(ys), at::cat(hs, 1)};
  }

  // The first's dx is that of all.
  static std::vector<composed::Gradients> backward_of_rows(
      const std::vector<at::Tensor>& dys, const ops::OptionalTensor& x,
      const std::vector<ops::OptionalTensor>& hs, const std::vector<Parameters>& parameters,
      const std::vector<composed::Needed>& needed) {
    const Path asked = asked_path();
    std::deque<Backward<Backend>> members;
    std::vector<bool> by_kernels(dys.size());
    bool all = may_take_kernels<Backend>(asked, dys[0]);
    const bool any = all;
    for (size_t i = 0; i < dys.size() && any; ++i) {
      members.emplace_back(dys[i], x, hs[i], parameters[i], needed[i]);
      by_kernels[i] = has_work(needed[i]) && members[i].takes_kernels(asked);
      all = all && (by_kernels[i] || !has_work(needed[i]));
    }
    std::vector<composed::Gradients> made;
    if constexpr (kTogether<BackwardCall>) {
      if (all) {
        at::Tensor dx;
        if (needed[0][0]) {
          dx = at::empty({dys[0].size(0), in_features(parameters[0].weight)}, dys[0].options());
        }
        std::vector<BackwardCall> calls;
        for (size_t i = 0; i < members.size(); ++i) {
          if (has_work(needed[i])) calls.push_back(members[i].into(dx));
        }
        Backend(dys[0]).launch_together(calls);
        for (auto& member : members) made.push_back(member.gradients());
        return made;
      }
    }
    at::Tensor dx;
    for (size_t i = 0; i < dys.size(); ++i) {
      if (by_kernels[i]) {
        made.push_back(members[i](asked));
        const at::Tensor& own = std::get<0>(made.back());
        if (dx.defined()) {
          dx.add_(own);
        } else {
          dx = own;
        }
      } else {
        made.push_back(composed_backward(dys[i], x, hs[i], parameters[i], needed[i], dx));
        dx = std::get<0>(made.back());
      }
    }
    std::get<0>(made[0]) = dx;
    return made;
  }
};

}  // namespace fused_lora
