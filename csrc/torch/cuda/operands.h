// Tensors as the kernels take them.
#pragma once

#include <ATen/core/Tensor.h>

#include "composed/rows.h"
#include "kernels/lora_linear.h"

namespace fused_lora::cuda {

// float64 has none.
bool has_kernels(at::ScalarType dtype);

// A dtype that has kernels.
kernels::DType kernel_dtype(at::ScalarType dtype);
at::ScalarType torch_dtype(kernels::DType dtype);

// A 2-D tensor, whatever its strides.
kernels::MatrixView view(const at::Tensor& matrix);

// rows: M×K or M×N. Reads torch's switch for tf32.
kernels::Problem problem(const at::Tensor& rows, int64_t out_features, int64_t in_features,
                         const at::Tensor& lora_a, bool round_adapters);

kernels::Dropout dropout(const composed::Dropout& dropout);

// Whether torch lets products of float32 matrices on CUDA go through tf32 units.
bool allows_tf32();

}  // namespace fused_lora::cuda
