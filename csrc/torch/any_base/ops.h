// The operators of fused_lora:: beside a frozen layer that computes by itself, called through
// torch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "torch/ops.h"

namespace fused_lora::ops {

// Schemas, which document the arguments: schema.cpp.
at::Tensor lora_add(const at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                    const at::Tensor& lora_b, double scaling, double dropout_p,
                    const OptionalTensor& seed, bool round_adapters, int64_t column_offset);

at::Tensor& lora_add_(at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                      const at::Tensor& lora_b, double scaling, double dropout_p,
                      const OptionalTensor& seed, bool round_adapters, int64_t column_offset);

std::tuple<at::Tensor, at::Tensor> lora_add_forward(const at::Tensor& base, const at::Tensor& x,
                                                    const at::Tensor& lora_a,
                                                    const at::Tensor& lora_b, double scaling,
                                                    double dropout_p, const OptionalTensor& seed,
                                                    bool round_adapters, int64_t column_offset);

at::Tensor lora_add_forward_(at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                             const at::Tensor& lora_b, double scaling, double dropout_p,
                             const OptionalTensor& seed, bool round_adapters,
                             int64_t column_offset);

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_add_backward(
    const at::Tensor& dy, const OptionalTensor& x, const at::Tensor& lora_a,
    const at::Tensor& lora_b, const OptionalTensor& h, at::ScalarType dtype, double scaling,
    double dropout_p, const OptionalTensor& seed, bool round_adapters, std::array<bool, 3> needed,
    int64_t column_offset);

// The tensor's memory as a tensor that is no view, and whose gradient goes to `view`: for who is to
// write all of it in place, which torch refuses for views that a custom Function returns, and where
// it does not, has a price in backward. Who kept `view` for a backward finds another version of it.
at::Tensor as_no_view(const at::Tensor& view);

}  // namespace fused_lora::ops
