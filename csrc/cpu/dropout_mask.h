#pragma once

#include <ATen/core/Tensor.h>

namespace fused_lora::cpu {

// The keep-mask of rows row_offset .. row_offset+rows-1 and columns column_offset ..
// column_offset+columns-1, as 0 and 1 in `dtype`. seed: one int64 on the CPU. Returns rows×columns.
at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t columns, double p,
                        int64_t row_offset, int64_t column_offset, at::ScalarType dtype);

}  // namespace fused_lora::cpu
