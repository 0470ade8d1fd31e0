#pragma once

#include <ATen/core/Tensor.h>

namespace fused_lora::cuda {

// As cpu::dropout_mask, bit for bit, on the current device and its current stream. seed: one int64
// on it.
at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t columns, double p,
                        int64_t row_offset, int64_t column_offset, at::ScalarType dtype);

}  // namespace fused_lora::cuda
