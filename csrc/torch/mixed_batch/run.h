// A batch whose rows belong to different adapters, on a device's backend (torch/run.h): check,
// choose a path, allocate, launch. Beyond a Backend it needs
//
//     MixedOperands<Backend>(adapters)         the adapters as its kernels take them
//       ForwardCall, BackwardCall              descriptions, as the kernels take them
//       index_of_rows(index, rows, count)      a row's adapter, for every row
//       fill(call)                             names the adapters in a call
//       allocate(call, needed)                 makes their gradients, and names them in a call
//       gradients(needed)                      those, once it has run
#pragma once

#include <ATen/ops/empty.h>

#include <vector>

#include "composed/mixed_batch.h"
#include "torch/mixed_batch/ops.h"
#include "torch/run.h"

namespace fused_lora {

template <typename Backend>
class MixedOperands;

// What forward and backward are given alike. adapters.index has an element a row.
struct MixedParameters {
  const at::Tensor& weight;
  composed::MixedAdapters adapters;
  composed::Dropout dropout;
  bool round_adapters;
};

template <typename Backend, typename Call>
void describe(Call& call, const at::Tensor& rows, const MixedParameters& p,
              const MixedOperands<Backend>& operands) {
  call.problem = Backend::problem(rows, p.weight, p.adapters.a[0], p.round_adapters);
  call.problem.rank = p.adapters.ranks();
  call.weight = Backend::view(p.weight);
  call.dropout = Backend::dropout(p.dropout);
  operands.fill(call);
}

inline ForwardResult composed_forward(const at::Tensor& x, const MixedParameters& p,
                                      const ops::OptionalTensor& bias) {
  return composed::mixed_forward(x, plain(p.weight), p.adapters, bias, p.dropout, p.round_adapters);
}

template <typename Backend>
class MixedForward final
    : public ForwardRun<Backend, typename MixedOperands<Backend>::ForwardCall, MixedParameters> {
  using Base = ForwardRun<Backend, typename MixedOperands<Backend>::ForwardCall, MixedParameters>;
  using Base::call_;
  using Base::p_;

 public:
  MixedForward(const at::Tensor& x, const MixedParameters& p, const ops::OptionalTensor& bias)
      : Base(x, p, bias), operands_(p.adapters) {
    describe<Backend>(call_, this->x_, p, operands_);
  }

 private:
  ShapeClass shape() const override {
    ShapeClass shape = forward_class(call_, this->on_.device());
    shape.mixed = p_.adapters.count();
    return shape;
  }

  void allocate() override { Base::allocate(p_.adapters.a[0], p_.adapters.ranks()); }

  MixedOperands<Backend> operands_;
};

inline composed::MixedGradients composed_backward(const at::Tensor& dy,
                                                  const ops::OptionalTensor& x,
                                                  const ops::OptionalTensor& h,
                                                  const MixedParameters& p,
                                                  const composed::MixedNeeded& needed) {
  // dx alone is made of the weight.
  const at::Tensor weight = needed.x ? plain(p.weight) : p.weight;
  return composed::mixed_backward(dy, x, weight, p.adapters, h, p.dropout, p.round_adapters,
                                  needed);
}

template <typename Backend>
class MixedBackward final : public Run<Backend, typename MixedOperands<Backend>::BackwardCall> {
  using Base = Run<Backend, typename MixedOperands<Backend>::BackwardCall>;
  using Base::call_;
  using Base::on_;

 public:
  MixedBackward(const at::Tensor& dy, const ops::OptionalTensor& x, const ops::OptionalTensor& h,
                const MixedParameters& p, const composed::MixedNeeded& needed)
      : Base(dy),
        p_(p),
        x_(x),
        h_(h),
        needed_(needed),
        dy_(composed::as_matrix(dy)),
        operands_(p.adapters) {
    describe<Backend>(call_, dy_, p, operands_);
    call_.dy = Backend::view(dy_);
    if (needed.any_a() || needed.weight) x_rows_ = composed::as_matrix(*x);
    if (needed.any_a()) call_.x = Backend::view(x_rows_);
    if (needed.any_b()) {
      dense_h_ = h->contiguous();
      call_.h = dense_h_.const_data_ptr();
    }
  }

  // A weight that trains has a gradient as large as itself: torch's own GEMM makes it.
  composed::MixedGradients operator()(Path asked) {
    if (!this->takes_kernels(asked)) return composed_backward(on_, x_, h_, p_, needed_);
    this->launch();
    composed::MixedGradients made = operands_.gradients(needed_);
    made.x = dx_;
    if (needed_.weight) made.weight = at::mm(dy_.t(), x_rows_);
    if (needed_.bias) made.bias = dy_.sum(0);
    return made;
  }

 private:
  ShapeClass shape() const override {
    ShapeClass shape =
        backward_class(call_, {needed_.x, needed_.any_a(), needed_.any_b()}, on_.device());
    shape.mixed = p_.adapters.count();
    return shape;
  }

  void allocate() override {
    if (allocated_) return;
    allocated_ = true;
    if (needed_.x) {
      dx_ = at::empty(composed::with_last_size(on_, in_features(p_.weight)), dy_.options());
      call_.dx = dx_.mutable_data_ptr();
    }
    operands_.allocate(call_, needed_);
  }

  void compose() override {
    composed::MixedNeeded needed = needed_;
    needed.weight = needed.bias = false;
    composed_backward(on_, x_, h_, p_, needed);
  }

  const MixedParameters& p_;
  const ops::OptionalTensor &x_, &h_;
  const composed::MixedNeeded& needed_;
  const at::Tensor dy_;
  MixedOperands<Backend> operands_;
  at::Tensor x_rows_, dense_h_, dx_;
  bool allocated_ = false;
};

template <typename Backend>
struct MixedOps {
  static ForwardResult forward(const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a,
                               at::TensorList lora_b, const at::Tensor& adapter_index,
                               const ops::OptionalTensor& bias, at::ArrayRef<double> scaling,
                               double dropout_p, const ops::OptionalTensor& seed,
                               bool round_adapters) {
    checks::mixed_forward_arguments(x, weight, lora_a, lora_b, adapter_index, bias, scaling,
                                    dropout_p, seed);
    const c10::DeviceGuard guard(x.device());
    const at::Tensor rows = MixedOperands<Backend>::index_of_rows(adapter_index, x, lora_a.size());
    const MixedParameters p = {
        weight, {lora_a, lora_b, scaling, rows}, {dropout_p, seed, Backend::mask}, round_adapters};
    const Path asked = asked_path();
    if (!may_take_kernels<Backend>(asked, x)) return composed_forward(x, p, bias);
    return MixedForward<Backend>(x, p, bias)(asked);
  }

  static ops::MixedGradients backward(const at::Tensor& dy, const ops::OptionalTensor& x,
                                      const at::Tensor& weight, at::TensorList lora_a,
                                      at::TensorList lora_b, const at::Tensor& adapter_index,
                                      const ops::OptionalTensor& h, at::ArrayRef<double> scaling,
                                      double dropout_p, const ops::OptionalTensor& seed,
                                      bool round_adapters, std::array<bool, 3> needed,
                                      c10::List<bool> needed_a, c10::List<bool> needed_b) {
    checks::mixed_backward_arguments(dy, x, weight, lora_a, lora_b, adapter_index, h, scaling,
                                     dropout_p, seed, round_adapters, needed[1], needed_a,
                                     needed_b);
    const c10::DeviceGuard guard(dy.device());
    const at::Tensor rows = MixedOperands<Backend>::index_of_rows(adapter_index, dy, lora_a.size());
    const MixedParameters p = {
        weight, {lora_a, lora_b, scaling, rows}, {dropout_p, seed, Backend::mask}, round_adapters};
    const composed::MixedNeeded wanted = {needed[0],
                                          needed[1],
                                          needed[2],
                                          {needed_a.begin(), needed_a.end()},
                                          {needed_b.begin(), needed_b.end()}};
    const Path asked = asked_path();
    const bool has_work = wanted.x || wanted.any_a() || wanted.any_b();
    composed::MixedGradients made = !has_work || !may_take_kernels<Backend>(asked, dy)
                                        ? composed_backward(dy, x, h, p, wanted)
                                        : MixedBackward<Backend>(dy, x, h, p, wanted)(asked);
    const auto or_empty = [](std::vector<at::Tensor> all, at::TensorList like) {
      for (size_t i = 0; i < all.size(); ++i) {
        if (!all[i].defined()) all[i] = at::empty({0}, like[i].options());
      }
      return all;
    };
    return {made.x, made.weight, made.bias, or_empty(std::move(made.a), lora_a),
            or_empty(std::move(made.b), lora_b)};
  }
};

}  // namespace fused_lora
