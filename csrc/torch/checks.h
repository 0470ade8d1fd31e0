// What the ops demand of their arguments. Each error names the argument, what was expected and what
// was given. Works on symbolic sizes, so the fakes raise the same errors.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "torch/ops.h"

namespace fused_lora::checks {

void forward_arguments(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_a,
                       const at::Tensor& lora_b, const std::optional<at::Tensor>& bias,
                       double dropout_p, const std::optional<at::Tensor>& seed,
                       int64_t column_offset);

// x and h may be missing where no gradient in `needed` is made of them.
void backward_arguments(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                        const at::Tensor& weight, const at::Tensor& lora_a,
                        const at::Tensor& lora_b, const std::optional<at::Tensor>& h,
                        double dropout_p, const std::optional<at::Tensor>& seed,
                        bool round_adapters, const std::array<bool, 5>& needed,
                        int64_t column_offset);

// The same for rows of several adapters, index: adapter_index. What lies in it is not looked at.
void mixed_forward_arguments(const at::Tensor& x, const at::Tensor& weight, at::TensorList lora_a,
                             at::TensorList lora_b, const at::Tensor& index,
                             const std::optional<at::Tensor>& bias, at::ArrayRef<double> scaling,
                             double dropout_p, const std::optional<at::Tensor>& seed);
void mixed_backward_arguments(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                              const at::Tensor& weight, at::TensorList lora_a,
                              at::TensorList lora_b, const at::Tensor& index,
                              const std::optional<at::Tensor>& h, at::ArrayRef<double> scaling,
                              double dropout_p, const std::optional<at::Tensor>& seed,
                              bool round_adapters, bool needs_weight,
                              const c10::List<bool>& needs_a, const c10::List<bool>& needs_b);

// Of a group: lists with an entry for each projection, and what every entry must be by itself.
void grouped_counts(at::TensorList weights, at::TensorList lora_a, at::TensorList lora_b,
                    const ops::OptionalTensors& biases, at::ArrayRef<double> scalings,
                    at::ArrayRef<double> dropout_p, const ops::OptionalTensors& seeds);
void grouped_forward_arguments(const at::Tensor& x, at::TensorList weights, at::TensorList lora_a,
                               at::TensorList lora_b, const ops::OptionalTensors& biases,
                               at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
                               const ops::OptionalTensors& seeds);
void grouped_backward_arguments(at::TensorList dy, const ops::OptionalTensor& x,
                                at::TensorList weights, at::TensorList lora_a,
                                at::TensorList lora_b, const ops::OptionalTensors& h,
                                at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
                                const ops::OptionalTensors& seeds, bool round_adapters,
                                const c10::List<bool>& needed);

// A plain weight that can be packed; and a packed one, of `op`'s.
void pack_arguments(const at::Tensor& weight);
void packed_weight(const char* op, const at::Tensor& packed);

void mask_arguments(const at::Tensor& seed, const c10::SymInt& rows, const c10::SymInt& columns,
                    double p, const c10::SymInt& row_offset, const c10::SymInt& column_offset);

}  // namespace fused_lora::checks
