// The op takes x with any number of leading dimensions; the arithmetic sees matrices.
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_lora::composed {

// M×C: all but the last dimension flattened. A view where strides allow one.
inline at::Tensor as_matrix(const at::Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  const int64_t columns = tensor.size(-1);
  int64_t rows = 1;  // not numel / columns: there may be no column
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return tensor.reshape({rows, columns});
}

// M, of sizes that may be symbolic.
inline c10::SymInt sym_rows(const at::Tensor& tensor) {
  c10::SymInt rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows = rows * tensor.sym_size(d);
  return rows;
}

// The tensor's leading dimensions, and another number of columns.
inline at::DimVector with_last_size(const at::Tensor& tensor, int64_t columns) {
  at::DimVector sizes(tensor.sizes());
  sizes.back() = columns;
  return sizes;
}

}  // namespace fused_lora::composed
