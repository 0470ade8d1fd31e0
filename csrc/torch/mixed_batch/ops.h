// The operators of fused_lora:: for a batch whose rows belong to different adapters, called through
// torch's dispatcher.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <vector>

#include "torch/ops.h"

namespace fused_lora::ops {

// Schemas, which document the arguments: schema.cpp.
at::Tensor lora_linear_mixed(const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a,
                             at::TensorList lora_b, const at::Tensor& adapter_index,
                             const OptionalTensor& bias, at::ArrayRef<double> scaling,
                             double dropout_p, const OptionalTensor& seed, bool round_adapters);

std::tuple<at::Tensor, at::Tensor> lora_linear_mixed_forward(
    const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a, at::TensorList lora_b,
    const at::Tensor& adapter_index, const OptionalTensor& bias, at::ArrayRef<double> scaling,
    double dropout_p, const OptionalTensor& seed, bool round_adapters);

using MixedGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>,
                                  std::vector<at::Tensor>>;
MixedGradients lora_linear_mixed_backward(const at::Tensor& dy, const OptionalTensor& x,
                                          const at::Tensor& weight, at::TensorList lora_a,
                                          at::TensorList lora_b, const at::Tensor& adapter_index,
                                          const OptionalTensor& h, at::ArrayRef<double> scaling,
                                          double dropout_p, const OptionalTensor& seed,
                                          bool round_adapters, std::array<bool, 3> needed,
                                          c10::List<bool> needed_a, c10::List<bool> needed_b);

}  // namespace fused_lora::ops
