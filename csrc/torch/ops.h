// The operators of fused_lora::, called through torch's dispatcher, so that autograd, autocast,
// fake tensors and tracing see every call.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace fused_lora::ops {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

// Schemas, which document the arguments: schema.cpp.
at::Tensor lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, const OptionalTensor& bias, double scaling,
                       double dropout_p, const OptionalTensor& seed, bool round_adapters,
                       int64_t column_offset = 0);

std::tuple<at::Tensor, at::Tensor> lora_linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const OptionalTensor& bias, double scaling, double dropout_p,
    const OptionalTensor& seed, bool round_adapters, int64_t column_offset = 0);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_backward(
    const at::Tensor& dy, const OptionalTensor& x, const at::Tensor& weight,
    const at::Tensor& lora_a, const at::Tensor& lora_b, const OptionalTensor& h, double scaling,
    double dropout_p, const OptionalTensor& seed, bool round_adapters, std::array<bool, 5> needed,
    int64_t column_offset = 0);

std::vector<at::Tensor> lora_linear_grouped(const at::Tensor& x, at::TensorList weights,
                                            at::TensorList lora_a, at::TensorList lora_b,
                                            const OptionalTensors& biases,
                                            at::ArrayRef<double> scalings,
                                            at::ArrayRef<double> dropout_p,
                                            const OptionalTensors& seeds, bool round_adapters);

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_linear_grouped_forward(
    const at::Tensor& x, at::TensorList weights, at::TensorList lora_a, at::TensorList lora_b,
    const OptionalTensors& biases, at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
    const OptionalTensors& seeds, bool round_adapters);

std::vector<at::Tensor> lora_linear_grouped_backward(
    at::TensorList dy, const OptionalTensor& x, at::TensorList weights, at::TensorList lora_a,
    at::TensorList lora_b, const OptionalTensors& h, at::ArrayRef<double> scalings,
    at::ArrayRef<double> dropout_p, const OptionalTensors& seeds, bool round_adapters,
    const c10::List<bool>& needed);

at::Tensor dropout_mask(const at::Tensor& seed, c10::SymInt rows, c10::SymInt columns, double p,
                        c10::SymInt row_offset, c10::SymInt column_offset, at::ScalarType dtype);

// A plain weight in panels and back (torch/packed_weight.h).
at::Tensor pack_weight(const at::Tensor& weight);
at::Tensor unpack_weight(const at::Tensor& packed);

}  // namespace fused_lora::ops
