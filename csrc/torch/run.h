// One call of an op, which either path can compute; and the ops as a device's backend serves them.
//
// A Backend is what a family of kernels is to the ops:
//
//     ForwardCall, BackwardCall       descriptions, as the kernels take them
//     Backend(on)                     for a call on the tensor `on`, under a guard for its device
//     obstacle(rows)                  why the kernels cannot serve a long operand; "" where they do
//     view, problem, dropout, mask    what descriptions are filled with
//     empty(sizes, like, dtype)       memory of torch's allocator, on the device of a tensor
//     complete(shape)                 adds to a class what else a choice depends on
//     presumed_faster(call), capturing(), time(fused, composed), launch(call)
//     launch_together(calls)          if it can launch calls of one x together
//     (torch/run_grouped.h)
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "composed/composed.h"
#include "composed/shapes.h"
#include "torch/checks.h"
#include "torch/choice.h"
#include "torch/ops.h"
#include "torch/packed_weight.h"
#include "torch/path.h"

namespace fused_lora {

template <typename Backend, typename Call>
class Run : public Candidate {
 public:
  bool presumed_faster() override {
    allocate();
    return backend_.presumed_faster(call_);
  }

  bool capturing() override { return backend_.capturing(); }

  std::optional<Times> time() override {
    try {
      return backend_.time([this] { launch(); }, [this] { compose(); });
    } catch (const c10::OutOfMemoryError&) {
      return std::nullopt;
    }
  }

  // Whether the kernels are to compute the call, with what was asked for.
  bool takes_kernels(Path asked) {
    if (asked != Path::kAuto) return asked == Path::kFused;
    if (call_.problem.rows == 0) return false;
    ShapeClass of_call = shape();
    backend_.complete(of_call);
    const bool deterministic = at::globalContext().deterministicAlgorithms();
    return choose(of_call, deterministic, *this) == Path::kFused;
  }

 protected:
  explicit Run(const at::Tensor& on) : on_(on), backend_(on) {}
  ~Run() = default;

  virtual ShapeClass shape() const = 0;
  // Makes the outputs and names them in the call; more than once to no effect.
  virtual void allocate() = 0;
  // The other path, to be timed: the result is dropped.
  virtual void compose() = 0;

  void launch() {
    allocate();
    backend_.launch(call_);
  }

  Call call_;
  const at::Tensor& on_;

 private:
  Backend backend_;
};

// What forward and backward are given alike.
struct Parameters {
  const at::Tensor &weight, &lora_a, &lora_b;
  double scaling;
  composed::Dropout dropout;
  bool round_adapters;
};

// What a call of one adapter has, whatever it is added to.
template <typename Backend, typename Call, typename P>
void describe_adapter(Call& call, const P& p) {
  call.lora_a = Backend::view(p.lora_a);
  call.lora_b = Backend::view(p.lora_b);
  call.scaling = p.scaling;
  call.dropout = Backend::dropout(p.dropout);
}

// rows: x or dy as a matrix.
template <typename Backend, typename Call>
void describe(Call& call, const at::Tensor& rows, const Parameters& p) {
  call.problem = Backend::problem(rows, p.weight, p.lora_a, p.round_adapters);
  call.weight = Backend::view(p.weight);
  describe_adapter<Backend>(call, p);
}

// h as a call takes it: rows of any distance, or, for kernels that do not know one, dense.
template <typename Call>
void set_h(Call& call, const at::Tensor& h) {
  if constexpr (requires { call.h_stride; }) call.h_stride = h.stride(0);
  call.h = h.mutable_data_ptr();
}

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;

inline ForwardResult composed_forward(const at::Tensor& x, const Parameters& p,
                                      const ops::OptionalTensor& bias) {
  return composed::forward(x, plain(p.weight), p.lora_a, p.lora_b, bias, p.scaling, p.dropout,
                           p.round_adapters);
}

// x and dy are read as matrices where their strides let one be seen in them. Only permuted leading
// dimensions do not: such rows are gathered first, as torch's own linear does.

// A forward with parameters P, which composed_forward takes, too.
template <typename Backend, typename Call, typename P>
class ForwardRun : public Run<Backend, Call> {
  using Base = Run<Backend, Call>;

 public:
  ForwardResult operator()(Path asked) {
    if (!this->takes_kernels(asked)) return composed_forward(on_, p_, bias_);
    this->launch();
    return {y_, h_};
  }

 protected:
  using Base::call_;
  using Base::on_;

  // What describes the call beside x and the bias is left to who knows P.
  ForwardRun(const at::Tensor& x, const P& p, const ops::OptionalTensor& bias)
      : Base(x), p_(p), x_(composed::as_matrix(x)), bias_(bias) {
    call_.x = Backend::view(x_);
    if (bias) {
      dense_bias_ = bias->contiguous();
      call_.bias = dense_bias_.const_data_ptr();
    }
  }
  ~ForwardRun() = default;

  // h has `ranks` columns.
  void allocate(const at::Tensor& lora_a, int64_t ranks) {
    if (y_.defined()) return;
    const auto low = composed::rank_dtype(x_, lora_a, p_.round_adapters);
    y_ = Backend::empty(composed::with_last_size(on_, out_features(p_.weight)), x_,
                        x_.scalar_type());
    if (!h_.defined()) h_ = Backend::empty({x_.size(0), ranks}, x_, low);
    call_.y = y_.mutable_data_ptr();
    set_h(call_, h_);
  }

  const P& p_;
  const at::Tensor x_;
  at::Tensor y_, h_;

 private:
  void compose() override { composed_forward(on_, p_, bias_); }

  const ops::OptionalTensor& bias_;
  at::Tensor dense_bias_;
};

template <typename Backend>
class Forward final : public ForwardRun<Backend, typename Backend::ForwardCall, Parameters> {
  using Base = ForwardRun<Backend, typename Backend::ForwardCall, Parameters>;
  using Base::call_;
  using Base::p_;

 public:
  Forward(const at::Tensor& x, const Parameters& p, const ops::OptionalTensor& bias)
      : Base(x, p, bias) {
    describe<Backend>(call_, this->x_, p);
  }

  // For a group, which launches its calls together: the call with y and a part of the group's h.
  const typename Backend::ForwardCall& into(const at::Tensor& h) {
    this->h_ = h;
    allocate();
    set_h(call_, h);  // of what was allocated before, to be timed, too
    return call_;
  }
  const at::Tensor& y() const { return this->y_; }

 private:
  ShapeClass shape() const override { return forward_class(call_, this->on_.device()); }

  void allocate() override { Base::allocate(p_.lora_a, p_.lora_a.size(0)); }
};

inline composed::Gradients composed_backward(const at::Tensor& dy, const ops::OptionalTensor& x,
                                             const ops::OptionalTensor& h, const Parameters& p,
                                             const composed::Needed& needed,
                                             const at::Tensor& dx_sum = {}) {
  // dx alone is made of the weight.
  const at::Tensor weight = needed[0] ? plain(p.weight) : p.weight;
  return composed::backward(dy, x, weight, p.lora_a, p.lora_b, h, p.scaling, p.dropout,
                            p.round_adapters, needed, dx_sum);
}

// What kernels can make of a backward: not the gradients of a weight and a bias alone.
inline bool has_work(const composed::Needed& needed) {
  return needed[0] || needed[2] || needed[3];
}

template <typename Backend>
class Backward final : public Run<Backend, typename Backend::BackwardCall> {
  using Base = Run<Backend, typename Backend::BackwardCall>;
  using Base::call_;
  using Base::on_;

 public:
  Backward(const at::Tensor& dy, const ops::OptionalTensor& x, const ops::OptionalTensor& h,
           const Parameters& p, const composed::Needed& needed)
      : Base(dy), p_(p), x_(x), h_(h), needed_(needed), dy_(composed::as_matrix(dy)) {
    describe<Backend>(call_, dy_, p);
    call_.dy = Backend::view(dy_);
    if (needs_a() || needs_weight()) x_rows_ = composed::as_matrix(*x);
    if (needs_a()) call_.x = Backend::view(x_rows_);
    if (needs_b()) {
      constexpr bool kAnyRows = requires { call_.h_stride; };
      h_rows_ = kAnyRows && h->stride(1) == 1 ? *h : h->contiguous();
      if constexpr (kAnyRows) call_.h_stride = h_rows_.stride(0);
      call_.h = h_rows_.const_data_ptr();
    }
  }

  // A weight that trains has a gradient as large as itself: torch's own GEMM makes it.
  composed::Gradients operator()(Path asked) {
    if (!this->takes_kernels(asked)) return composed_backward(on_, x_, h_, p_, needed_);
    this->launch();
    return gradients();
  }

  // For a group, which launches its calls together: the call with the group's dx.
  const typename Backend::BackwardCall& into(const at::Tensor& dx) {
    dx_ = dx;
    allocate();
    call_.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
    return call_;
  }

  // What the kernels made, and with it what they leave to torch.
  composed::Gradients gradients() const {
    at::Tensor dweight, dbias;
    if (needs_weight()) dweight = at::mm(dy_.t(), x_rows_);
    if (needed_[4]) dbias = dy_.sum(0);
    return {dx_, dweight, dlora_a_, dlora_b_, dbias};
  }

 private:
  bool needs_x() const { return needed_[0]; }
  bool needs_weight() const { return needed_[1]; }
  bool needs_a() const { return needed_[2]; }
  bool needs_b() const { return needed_[3]; }

  ShapeClass shape() const override {
    return backward_class(call_, {needs_x(), needs_a(), needs_b()}, on_.device());
  }

  void allocate() override {
    if (allocated_) return;
    allocated_ = true;
    const auto dense = [](at::IntArrayRef sizes, const at::Tensor& like) {
      return Backend::empty(sizes, like, like.scalar_type());
    };
    if (needs_x() && !dx_.defined())
      dx_ = dense(composed::with_last_size(on_, in_features(p_.weight)), dy_);
    if (needs_a()) dlora_a_ = dense(p_.lora_a.sizes(), p_.lora_a);
    if (needs_b()) dlora_b_ = dense(p_.lora_b.sizes(), p_.lora_b);
    const auto pointer = [](const at::Tensor& t) {
      return t.defined() ? t.mutable_data_ptr() : nullptr;
    };
    call_.dx = pointer(dx_);
    call_.dlora_a = pointer(dlora_a_);
    call_.dlora_b = pointer(dlora_b_);
  }

  void compose() override {
    composed_backward(on_, x_, h_, p_, {needs_x(), false, needs_a(), needs_b(), false});
  }

  const Parameters& p_;
  const ops::OptionalTensor &x_, &h_;
  const composed::Needed& needed_;
  const at::Tensor dy_;
  at::Tensor x_rows_, h_rows_, dx_, dlora_a_, dlora_b_;
  bool allocated_ = false;
};

// Whether a backend's kernels come into question for a long operand. Asked for by name they serve
// or throw.
template <typename Backend>
bool may_take_kernels(Path asked, const at::Tensor& rows) {
  if (asked == Path::kComposed) return false;
  const std::string obstacle = Backend::obstacle(rows);
  TORCH_CHECK(obstacle.empty() || asked != Path::kFused,
              "lora_linear: path 'fused' was asked for, but ", obstacle);
  return obstacle.empty();
}

// The ops on a backend: check, choose a path, allocate, launch.
template <typename Backend>
struct Ops {
  static ForwardResult forward(const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& lora_a, const at::Tensor& lora_b,
                               const ops::OptionalTensor& bias, double scaling, double dropout_p,
                               const ops::OptionalTensor& seed, bool round_adapters,
                               int64_t column_offset) {
    checks::forward_arguments(x, weight, lora_a, lora_b, bias, dropout_p, seed, column_offset);
    const c10::DeviceGuard guard(x.device());
    const Parameters p = {
        weight,        lora_a, lora_b, scaling, {dropout_p, seed, Backend::mask, column_offset},
        round_adapters};
    const Path asked = asked_path();
    if (!may_take_kernels<Backend>(asked, x)) return composed_forward(x, p, bias);
    return Forward<Backend>(x, p, bias)(asked);
  }

  static composed::Gradients backward(const at::Tensor& dy, const ops::OptionalTensor& x,
                                      const at::Tensor& weight, const at::Tensor& lora_a,
                                      const at::Tensor& lora_b, const ops::OptionalTensor& h,
                                      double scaling, double dropout_p,
                                      const ops::OptionalTensor& seed, bool round_adapters,
                                      composed::Needed needed, int64_t column_offset) {
    checks::backward_arguments(dy, x, weight, lora_a, lora_b, h, dropout_p, seed, round_adapters,
                               needed, column_offset);
    const c10::DeviceGuard guard(dy.device());
    const Parameters p = {
        weight,        lora_a, lora_b, scaling, {dropout_p, seed, Backend::mask, column_offset},
        round_adapters};
    const Path asked = asked_path();
    if (!has_work(needed) || !may_take_kernels<Backend>(asked, dy)) {
      return composed_backward(dy, x, h, p, needed);
    }
    return Backward<Backend>(dy, x, h, p, needed)(asked);
  }

  static at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t columns, double p,
                                 int64_t row_offset, int64_t column_offset, at::ScalarType dtype) {
    checks::mask_arguments(seed, rows, columns, p, row_offset, column_offset);
    const c10::DeviceGuard guard(seed.device());
    return Backend::mask(seed, rows, columns, p, row_offset, column_offset, dtype);
  }
};

}  // namespace fused_lora
