#include <torch/library.h>

#include "torch/find_op.h"
#include "torch/ops.h"
#include "torch/registration.h"

// lora_linear is what callers use; forward and backward are what it is made of, so that a traced
// graph holds both halves and a partitioner can move them. Dropout is on where dropout_p > 0, and
// then takes a seed (one int64 on x's device); `round_adapters` rounds fp32 masters to x's dtype
// inside. x may be some columns of a wider matrix, whose mask
// begins at column_offset. Backward takes x only where dweight or dlora_a is needed, and h only
// where dlora_b is.
//
// A weight is out_features×in_features, or on the CPU what pack_weight makes of it: 3-D, panels of
// 32 rows that the kernels read from beginning to end (torch/packed_weight.h). A packed weight has
// no gradient.
//
// lora_linear_grouped is that of several projections of one x: a list holds an entry for each.
// Their h lie side by side, M×Σr. Backward takes the projections whose dy there is, and returns of
// the gradients those that are `needed`, in its order: dx, the sum over the projections, and for
// each of them dweight, dlora_a, dlora_b and dbias.
FUSED_LORA_DEFINE_LIBRARY(FUSED_LORA_LIBRARY, m) {
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias=None, *, "
      "float scaling=1.0, float dropout_p=0.0, Tensor? seed=None, bool round_adapters=False, "
      "int column_offset=0) "
      "-> Tensor");
  m.def(
      "lora_linear_forward(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
      "float scaling, float dropout_p, Tensor? seed, bool round_adapters, int column_offset=0) -> "
      "(Tensor y, Tensor h)");
  m.def(
      "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, "
      "Tensor? h, float scaling, float dropout_p, Tensor? seed, bool round_adapters, "
      "bool[5] needed, int column_offset=0) -> (Tensor dx, Tensor dweight, Tensor dlora_a, Tensor "
      "dlora_b, Tensor "
      "dbias)");
  m.def(
      "lora_linear_grouped(Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor?[] biases, *, float[] scalings, float[] dropout_p, Tensor?[] seeds, "
      "bool round_adapters=False) -> Tensor[]");
  m.def(
      "lora_linear_grouped_forward(Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor?[] biases, float[] scalings, float[] dropout_p, Tensor?[] seeds, "
      "bool round_adapters) -> (Tensor[] y, Tensor h)");
  m.def(
      "lora_linear_grouped_backward(Tensor[] dy, Tensor? x, Tensor[] weights, Tensor[] lora_a, "
      "Tensor[] lora_b, Tensor?[] h, float[] scalings, float[] dropout_p, Tensor?[] seeds, "
      "bool round_adapters, bool[] needed) -> Tensor[]");
  m.def(
      "dropout_mask(Tensor seed, SymInt rows, SymInt columns, float p, *, SymInt row_offset=0, "
      "SymInt column_offset=0, ScalarType dtype=bool) -> Tensor");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("unpack_weight(Tensor packed) -> Tensor");
}

namespace fused_lora::ops {

at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, const OptionalTensor& bias, double scaling,
                       double dropout_p, const OptionalTensor& seed, bool round_adapters,
                       int64_t column_offset) {
  static const auto op = find<decltype(lora_linear)>("lora_linear");
  return op.call(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, round_adapters,
                 column_offset);
}

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const OptionalTensor& bias, double scaling, double dropout_p,
    const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  static const auto op = find<decltype(lora_linear_forward)>("lora_linear_forward");
  return op.call(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, round_adapters,
                 column_offset);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& dy, const OptionalTensor& x, const at::Tensor& weight,
    const at::Tensor& lora_a, const at::Tensor& lora_b, const OptionalTensor& h, double scaling,
    double dropout_p, const OptionalTensor& seed, bool round_adapters, std::array<bool, 5> needed,
    int64_t column_offset) {
  static const auto op = find<decltype(lora_linear_backward)>("lora_linear_backward");
  return op.call(dy, x, weight, lora_a, lora_b, h, scaling, dropout_p, seed, round_adapters, needed,
                 column_offset);
}

std::vector<at::Tensor> lora_linear_grouped(const at::Tensor& x, at::TensorList weights,
                                            at::TensorList lora_a, at::TensorList lora_b,
                                            const OptionalTensors& biases,
                                            at::ArrayRef<double> scalings,
                                            at::ArrayRef<double> dropout_p,
                                            const OptionalTensors& seeds, bool round_adapters) {
  static const auto op = find<decltype(lora_linear_grouped)>("lora_linear_grouped");
  return op.call(x, weights, lora_a, lora_b, biases, scalings, dropout_p, seeds, round_adapters);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_linear_grouped_forward(
    const at::Tensor& x, at::TensorList weights, at::TensorList lora_a, at::TensorList lora_b,
    const OptionalTensors& biases, at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
    const OptionalTensors& seeds, bool round_adapters) {
  static const auto op = find<decltype(lora_linear_grouped_forward)>("lora_linear_grouped_forward");
  return op.call(x, weights, lora_a, lora_b, biases, scalings, dropout_p, seeds, round_adapters);
}

std::vector<at::Tensor> lora_linear_grouped_backward(
    at::TensorList dy, const OptionalTensor& x, at::TensorList weights, at::TensorList lora_a,
    at::TensorList lora_b, const OptionalTensors& h, at::ArrayRef<double> scalings,
    at::ArrayRef<double> dropout_p, const OptionalTensors& seeds, bool round_adapters,
    const c10::List<bool>& needed) {
  static const auto op =
      find<decltype(lora_linear_grouped_backward)>("lora_linear_grouped_backward");
  return op.call(dy, x, weights, lora_a, lora_b, h, scalings, dropout_p, seeds, round_adapters,
                 needed);
}

at::Tensor dropout_mask(const at::Tensor& seed, c10::SymInt rows, c10::SymInt columns, double p,
                        c10::SymInt row_offset, c10::SymInt column_offset, at::ScalarType dtype) {
  static const auto op = find<decltype(dropout_mask)>("dropout_mask");
  return op.call(seed, std::move(rows), std::move(columns), p, std::move(row_offset),
                 std::move(column_offset), dtype);
}

at::Tensor pack_weight(const at::Tensor& weight) {
  static const auto op = find<decltype(pack_weight)>("pack_weight");
  return op.call(weight);
}

at::Tensor unpack_weight(const at::Tensor& packed) {
  static const auto op = find<decltype(unpack_weight)>("unpack_weight");
  return op.call(packed);
}

}  // namespace fused_lora::ops
