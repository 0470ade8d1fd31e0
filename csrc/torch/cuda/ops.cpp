// The ops on CUDA: check, choose a path, allocate, launch.
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "composed/composed.h"
#include "composed/shapes.h"
#include "torch/checks.h"
#include "torch/cuda/mask.h"
#include "torch/cuda/operands.h"
#include "torch/cuda/run.h"
#include "torch/ops.h"
#include "torch/path.h"
#include "torch/registration.h"

namespace fused_lora {
namespace {

using at::Tensor;
using composed::Gradients;
using composed::Needed;
using ops::OptionalTensor;

// Whether the kernels come into question for a long operand. Asked for by name they serve or throw.
bool may_take_kernels(Path asked, const Tensor& rows) {
  if (asked == Path::kComposed) return false;
  if (cuda::has_kernels(rows.scalar_type())) return true;
  TORCH_CHECK(asked != Path::kFused,
              "lora_linear: path 'fused' was asked for, but there are no fused kernels for "
              "torch.float64");
  return false;
}

// What forward and backward are given alike.
struct Parameters {
  const Tensor &weight, &lora_a, &lora_b;
  double scaling;
  composed::Dropout dropout;
  bool round_adapters;

  // rows: x or dy as a matrix.
  template <typename Call>
  void describe(Call& call, const Tensor& rows) const {
    call.problem = cuda::problem(rows, weight, lora_a, round_adapters);
    call.weight = cuda::view(weight);
    call.lora_a = cuda::view(lora_a);
    call.lora_b = cuda::view(lora_b);
    call.scaling = scaling;
    call.dropout = cuda::dropout(dropout);
  }
};

using ForwardResult = std::tuple<Tensor, Tensor>;

ForwardResult composed_forward(const Tensor& x, const Parameters& p, const OptionalTensor& bias) {
  return composed::forward(x, p.weight, p.lora_a, p.lora_b, bias, p.scaling, p.dropout,
                           p.round_adapters);
}

// x and dy are read as matrices where their strides let one be seen in them. Only permuted leading
// dimensions do not: such rows are gathered first, as torch's own linear does.
class Forward final : public cuda::Run<kernels::ForwardCall> {
 public:
  Forward(const Tensor& x, const Parameters& p, const OptionalTensor& bias)
      : Run(x), p_(p), bias_(bias), x_(composed::as_matrix(x)) {
    p.describe(call_, x_);
    call_.x = cuda::view(x_);
    if (bias) {
      dense_bias_ = bias->contiguous();
      call_.bias = dense_bias_.const_data_ptr();
    }
  }

  ForwardResult operator()(Path asked) {
    if (!takes_kernels(asked)) return composed_forward(on_, p_, bias_);
    launch();
    return {y_, h_};
  }

 private:
  cuda::ShapeClass shape() const override {
    return cuda::ShapeClass::of(call_, on_.device().index());
  }

  void allocate() override {
    if (y_.defined()) return;
    const auto low = composed::rank_dtype(x_, p_.lora_a, p_.round_adapters);
    y_ = at::empty(composed::with_last_size(on_, p_.weight.size(0)), x_.options());
    h_ = at::empty({x_.size(0), p_.lora_a.size(0)}, x_.options().dtype(low));
    call_.y = y_.mutable_data_ptr();
    call_.h = h_.mutable_data_ptr();
  }

  void compose() override { composed_forward(on_, p_, bias_); }

  const Parameters& p_;
  const OptionalTensor& bias_;
  const Tensor x_;
  Tensor dense_bias_, y_, h_;
};

Gradients composed_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h,
                            const Parameters& p, const Needed& needed) {
  return composed::backward(dy, x, p.weight, p.lora_a, p.lora_b, h, p.scaling, p.dropout,
                            p.round_adapters, needed);
}

class Backward final : public cuda::Run<kernels::BackwardCall> {
 public:
  Backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& h, const Parameters& p,
           const Needed& needed)
      : Run(dy), p_(p), x_(x), h_(h), needed_(needed), dy_(composed::as_matrix(dy)) {
    p.describe(call_, dy_);
    call_.dy = cuda::view(dy_);
    if (needs_a() || needs_weight()) x_rows_ = composed::as_matrix(*x);
    if (needs_a()) call_.x = cuda::view(x_rows_);
    if (needs_b()) {
      dense_h_ = h->contiguous();
      call_.h = dense_h_.const_data_ptr();
    }
  }

  // A weight that trains has a gradient as large as itself: torch's own GEMM makes it.
  Gradients operator()(Path asked) {
    if (!takes_kernels(asked)) return composed_backward(on_, x_, h_, p_, needed_);
    launch();
    Tensor dweight, dbias;
    if (needs_weight()) dweight = at::mm(dy_.t(), x_rows_);
    if (needed_[4]) dbias = dy_.sum(0);
    return {dx_, dweight, dlora_a_, dlora_b_, dbias};
  }

 private:
  bool needs_x() const { return needed_[0]; }
  bool needs_weight() const { return needed_[1]; }
  bool needs_a() const { return needed_[2]; }
  bool needs_b() const { return needed_[3]; }

  cuda::ShapeClass shape() const override {
    return cuda::ShapeClass::of(call_, {needs_x(), needs_a(), needs_b()}, on_.device().index());
  }

  void allocate() override {
    if (allocated_) return;
    allocated_ = true;
    const auto dense = [](at::IntArrayRef sizes, const Tensor& like) {
      return at::empty(sizes, like.options());
    };
    if (needs_x()) dx_ = dense(composed::with_last_size(on_, p_.weight.size(1)), dy_);
    if (needs_a()) dlora_a_ = dense(p_.lora_a.sizes(), p_.lora_a);
    if (needs_b()) dlora_b_ = dense(p_.lora_b.sizes(), p_.lora_b);
    const auto pointer = [](const Tensor& t) {
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
  const OptionalTensor &x_, &h_;
  const Needed& needed_;
  const Tensor dy_;
  Tensor x_rows_, dense_h_, dx_, dlora_a_, dlora_b_;
  bool allocated_ = false;
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                                   const Tensor& lora_b, const OptionalTensor& bias, double scaling,
                                   double dropout_p, const OptionalTensor& seed,
                                   bool round_adapters) {
  checks::forward_arguments(x, weight, lora_a, lora_b, bias, dropout_p, seed);
  const c10::DeviceGuard guard(x.device());
  const Parameters p = {
      weight, lora_a, lora_b, scaling, {dropout_p, seed, cuda::dropout_mask}, round_adapters};
  const Path asked = asked_path();
  if (!may_take_kernels(asked, x)) return composed_forward(x, p, bias);
  return Forward(x, p, bias)(asked);
}

Gradients backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight,
                   const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& h,
                   double scaling, double dropout_p, const OptionalTensor& seed,
                   bool round_adapters, Needed needed) {
  checks::backward_arguments(dy, x, weight, lora_a, lora_b, h, dropout_p, seed, round_adapters,
                             needed);
  const c10::DeviceGuard guard(dy.device());
  const Parameters p = {
      weight, lora_a, lora_b, scaling, {dropout_p, seed, cuda::dropout_mask}, round_adapters};
  const auto [needs_x, needs_weight, needs_a, needs_b, needs_bias] = needed;
  const Path asked = asked_path();
  const bool has_work = needs_x || needs_a || needs_b;
  if (!has_work || !may_take_kernels(asked, dy)) return composed_backward(dy, x, h, p, needed);
  return Backward(dy, x, h, p, needed)(asked);
}

Tensor dropout_mask(const Tensor& seed, int64_t rows, int64_t columns, double p, int64_t row_offset,
                    int64_t column_offset, at::ScalarType dtype) {
  checks::mask_arguments(seed, rows, columns, p, row_offset, column_offset);
  const c10::DeviceGuard guard(seed.device());
  return cuda::dropout_mask(seed, rows, columns, p, row_offset, column_offset, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, FUSED_LORA_CUDA_KEY, m) {
  m.impl("lora_linear_forward", &forward);
  m.impl("lora_linear_backward", &backward);
  m.impl("dropout_mask", &dropout_mask);
}

}  // namespace fused_lora
