// The adapter of a frozen layer that computes by itself, on a device's backend (torch/run.h):
// check, choose a path, allocate, launch. Beyond a Backend it needs
//
//     add_obstacle(y, dtype)        why the kernels cannot add to a y, or read a dy, like this one
//                                   beside an x of a dtype; "" where they do
//     add_problem(y, dtype, lora_a, round_adapters)       of such a call. y: M×N
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>

#include <tuple>
#include <utility>

#include "torch/any_base/checks.h"
#include "torch/any_base/ops.h"
#include "torch/run.h"

namespace fused_lora {

// What forward and backward are given alike. dtype: x's.
struct AddParameters {
  const at::Tensor &lora_a, &lora_b;
  at::ScalarType dtype;
  double scaling;
  composed::Dropout dropout;
  bool round_adapters;
};

// y: base or dy as a matrix.
template <typename Backend, typename Call>
void describe(Call& call, const at::Tensor& y, const AddParameters& p) {
  call.problem = Backend::add_problem(y, p.dtype, p.lora_a, p.round_adapters);
  describe_adapter<Backend>(call, p);
}

// base, into: M×N. Returns h.
inline at::Tensor composed_add(const at::Tensor& base, const at::Tensor& x, at::Tensor into,
                               const AddParameters& p) {
  if (!into.is_same(base)) into.copy_(base);
  return composed::add_forward(into, x, p.lora_a, p.lora_b, p.scaling, p.dropout, p.round_adapters);
}

// base: M×N. into: what is written, M×N and dense; base itself where the sum takes its place.
template <typename Backend>
class AddForward final : public Run<Backend, typename Backend::ForwardCall> {
  using Base = Run<Backend, typename Backend::ForwardCall>;
  using Base::call_;
  using Base::on_;

 public:
  AddForward(const at::Tensor& base, const at::Tensor& x, const at::Tensor& into,
             const AddParameters& p)
      : Base(x), p_(p), in_place_(into.is_same(base)), x_(composed::as_matrix(x)) {
    describe<Backend>(call_, base, p);
    call_.x = Backend::view(x_);
    point_to(readable(base), into);
  }

  // Returns h.
  at::Tensor operator()(Path asked) {
    if (!this->takes_kernels(asked)) return composed_add(base_, on_, into_, p_);
    this->launch();
    return h_;
  }

  // What takes its own sum's place is added to but once: a copy is timed.
  std::optional<Times> time() override {
    if (!in_place_) return Base::time();
    const at::Tensor base = base_;
    std::optional<Times> times;
    try {
      const at::Tensor copy = base.clone();
      point_to(copy, copy);
      times = Base::time();
    } catch (const c10::OutOfMemoryError&) {
    }
    point_to(base, base);
    return times;
  }

 private:
  ShapeClass shape() const override {
    ShapeClass shape = forward_class(call_, on_.device());
    shape.add_to(base_.scalar_type());
    shape.in_place = in_place_;
    return shape;
  }

  void allocate() override {
    if (h_.defined()) return;
    const auto low = composed::rank_dtype(p_.dtype, p_.lora_a, p_.round_adapters);
    h_ = Backend::empty({x_.size(0), p_.lora_a.size(0)}, x_, low);
    set_h(call_, h_);
  }

  void compose() override { composed_add(base_, on_, into_, p_); }

  void point_to(const at::Tensor& base, const at::Tensor& into) {
    base_ = base;
    into_ = into;
    call_.base = base.const_data_ptr();
    call_.base_stride = base.size(0) > 1 ? base.stride(0) : base.size(1);
    call_.y = into.mutable_data_ptr();
  }

  // The kernels read it by rows.
  static at::Tensor readable(const at::Tensor& base) {
    return base.size(1) <= 1 || base.stride(1) == 1 ? base : base.contiguous();
  }

  const AddParameters& p_;
  const bool in_place_;
  const at::Tensor x_;
  at::Tensor base_, into_, h_;
};

inline composed::AddGradients composed_backward(const at::Tensor& dy, const ops::OptionalTensor& x,
                                                const ops::OptionalTensor& h,
                                                const AddParameters& p,
                                                const composed::AddNeeded& needed) {
  return composed::add_backward(dy, x, p.lora_a, p.lora_b, h, p.dtype, p.scaling, p.dropout,
                                p.round_adapters, needed);
}

template <typename Backend>
class AddBackward final : public Run<Backend, typename Backend::BackwardCall> {
  using Base = Run<Backend, typename Backend::BackwardCall>;
  using Base::call_;
  using Base::on_;

 public:
  AddBackward(const at::Tensor& dy, const ops::OptionalTensor& x, const ops::OptionalTensor& h,
              const AddParameters& p, const composed::AddNeeded& needed)
      : Base(dy), p_(p), x_(x), h_(h), needed_(needed), dy_(composed::as_matrix(dy)) {
    describe<Backend>(call_, dy_, p);
    call_.dy = Backend::view(dy_);
    if (needs_a()) {
      x_rows_ = composed::as_matrix(*x);
      call_.x = Backend::view(x_rows_);
    }
    if (needs_b()) {
      dense_h_ = h->contiguous();
      call_.h = dense_h_.const_data_ptr();
    }
  }

  composed::AddGradients operator()(Path asked) {
    if (!this->takes_kernels(asked)) return composed_backward(on_, x_, h_, p_, needed_);
    this->launch();
    return {dx_, dlora_a_, dlora_b_};
  }

 private:
  bool needs_x() const { return needed_[0]; }
  bool needs_a() const { return needed_[1]; }
  bool needs_b() const { return needed_[2]; }

  ShapeClass shape() const override {
    ShapeClass shape = backward_class(call_, {needs_x(), needs_a(), needs_b()}, on_.device());
    shape.add_to(dy_.scalar_type());
    return shape;
  }

  void allocate() override {
    if (allocated_) return;
    allocated_ = true;
    const auto dense = [](const at::Tensor& like) {
      return Backend::empty(like.sizes(), like, like.scalar_type());
    };
    if (needs_x()) {
      dx_ = Backend::empty(composed::with_last_size(on_, p_.lora_a.size(1)), dy_, p_.dtype);
      call_.dx = dx_.mutable_data_ptr();
    }
    if (needs_a()) {
      dlora_a_ = dense(p_.lora_a);
      call_.dlora_a = dlora_a_.mutable_data_ptr();
    }
    if (needs_b()) {
      dlora_b_ = dense(p_.lora_b);
      call_.dlora_b = dlora_b_.mutable_data_ptr();
    }
  }

  void compose() override { composed_backward(on_, x_, h_, p_, needed_); }

  const AddParameters& p_;
  const ops::OptionalTensor &x_, &h_;
  const composed::AddNeeded& needed_;
  const at::Tensor dy_;
  at::Tensor x_rows_, dense_h_, dx_, dlora_a_, dlora_b_;
  bool allocated_ = false;
};

template <typename Backend>
struct AddOps {
  static std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& base, const at::Tensor& x,
                                                    const at::Tensor& lora_a,
                                                    const at::Tensor& lora_b, double scaling,
                                                    double dropout_p,
                                                    const ops::OptionalTensor& seed,
                                                    bool round_adapters, int64_t column_offset) {
    checks::add_forward_arguments(base, x, lora_a, lora_b, dropout_p, seed, column_offset);
    const c10::DeviceGuard guard(x.device());
    const at::Tensor y = Backend::empty(base.sizes(), base, base.scalar_type());
    const AddParameters p = {lora_a,
                             lora_b,
                             x.scalar_type(),
                             scaling,
                             {dropout_p, seed, Backend::mask, column_offset},
                             round_adapters};
    return {y, add(composed::as_matrix(base), x, composed::as_matrix(y), p)};
  }

  static at::Tensor forward_(at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                             const at::Tensor& lora_b, double scaling, double dropout_p,
                             const ops::OptionalTensor& seed, bool round_adapters,
                             int64_t column_offset) {
    checks::add_forward_arguments(base, x, lora_a, lora_b, dropout_p, seed, column_offset);
    at::assert_no_internal_overlap(base);
    for (const at::Tensor& read : {x, lora_a, lora_b}) at::assert_no_overlap(base, read);
    if (!base.is_contiguous()) {
      const auto [y, h] =
          forward(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters, column_offset);
      base.copy_(y);
      return h;
    }
    const c10::DeviceGuard guard(x.device());
    const AddParameters p = {lora_a,
                             lora_b,
                             x.scalar_type(),
                             scaling,
                             {dropout_p, seed, Backend::mask, column_offset},
                             round_adapters};
    const at::Tensor rows = composed::as_matrix(base);
    return add(rows, x, rows, p);
  }

  static composed::AddGradients backward(const at::Tensor& dy, const ops::OptionalTensor& x,
                                         const at::Tensor& lora_a, const at::Tensor& lora_b,
                                         const ops::OptionalTensor& h, at::ScalarType dtype,
                                         double scaling, double dropout_p,
                                         const ops::OptionalTensor& seed, bool round_adapters,
                                         composed::AddNeeded needed, int64_t column_offset) {
    checks::add_backward_arguments(dy, x, lora_a, lora_b, h, dtype, dropout_p, seed, round_adapters,
                                   needed, column_offset);
    const c10::DeviceGuard guard(dy.device());
    const AddParameters p = {
        lora_a,        lora_b, dtype, scaling, {dropout_p, seed, Backend::mask, column_offset},
        round_adapters};
    const Path asked = asked_path();
    const bool has_work = needed[0] || needed[1] || needed[2];
    if (!has_work || !may_take_kernels(asked, dy, dtype)) {
      return composed_backward(dy, x, h, p, needed);
    }
    return AddBackward<Backend>(dy, x, h, p, needed)(asked);
  }

 private:
  static at::Tensor add(const at::Tensor& base, const at::Tensor& x, const at::Tensor& into,
                        const AddParameters& p) {
    const Path asked = asked_path();
    if (!may_take_kernels(asked, base, p.dtype)) return composed_add(base, x, into, p);
    return AddForward<Backend>(base, x, into, p)(asked);
  }

  // As run.h's.
  static bool may_take_kernels(Path asked, const at::Tensor& y, at::ScalarType dtype) {
    if (asked == Path::kComposed) return false;
    const std::string obstacle = Backend::add_obstacle(y, dtype);
    TORCH_CHECK(obstacle.empty() || asked != Path::kFused,
                "lora_add: path 'fused' was asked for, but ", obstacle);
    return obstacle.empty();
  }
};

}  // namespace fused_lora
