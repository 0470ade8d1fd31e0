// What lora_add demands of its arguments; as torch/checks.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace fused_lora::checks {

void add_forward_arguments(const at::Tensor& base, const at::Tensor& x, const at::Tensor& lora_a,
                           const at::Tensor& lora_b, double dropout_p,
                           const std::optional<at::Tensor>& seed, int64_t column_offset);

// x and h may be missing where no gradient in `needed` is made of them. dtype: x's.
void add_backward_arguments(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                            const at::Tensor& lora_a, const at::Tensor& lora_b,
                            const std::optional<at::Tensor>& h, at::ScalarType dtype,
                            double dropout_p, const std::optional<at::Tensor>& seed,
                            bool round_adapters, const std::array<bool, 3>& needed,
                            int64_t column_offset);

}  // namespace fused_lora::checks
