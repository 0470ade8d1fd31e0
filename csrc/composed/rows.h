// A long operand (x or dy) as the low-rank path reads it: M rows, with a cast and dropout applied
// on the way, a block of rows at a time, so that neither a masked nor a cast copy of it ever exists
// whole.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mul.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "common/dropout.h"

namespace fused_lora::composed {

// Draws the keep-mask of a block, rows×columns:
// (seed, rows, columns, p, row_offset, column_offset, dtype).
using DrawMask = at::Tensor (*)(const at::Tensor&, int64_t, int64_t, double, int64_t, int64_t,
                                at::ScalarType);

// Dropout with probability p, its mask drawn again from the seed wherever it is needed. The mask is
// 0 and 1; `scale` is folded into a product's factor by whoever multiplies, because 1/(1-p) is not
// representable in 16 bits and a mask is. What it falls on are the columns from column_offset on of
// the matrix that the seed's mask is of.
struct Dropout {
  double p;
  double scale;
  std::optional<at::Tensor> seed;
  DrawMask draw;
  int64_t column_offset;

  Dropout(double p, std::optional<at::Tensor> seed, DrawMask draw, int64_t column_offset = 0)
      : p(p),
        scale(p > 0.0 ? DropoutRule::from_probability(p).scale : 1.0),
        seed(std::move(seed)),
        draw(draw),
        column_offset(column_offset) {}

  bool active() const { return p > 0.0; }

  at::Tensor mask(int64_t row, int64_t rows, int64_t columns, at::ScalarType dtype) const {
    return draw(*seed, rows, columns, p, row, column_offset, dtype);
  }
};

// Elements of a block of rows whose transient copy is made. On the CPU it stays in a core's cache:
// 1 MiB in fp32. A GPU wants as few launches as may be: 64 MiB.
inline int64_t block_elements(const at::Device& device) {
  return device.is_cpu() ? int64_t{1} << 18 : int64_t{1} << 24;
}

// Calls body(row, rows) for consecutive blocks of an M×columns operand: one block where the operand
// is read as it lies (`whole`), else blocks of the size above.
template <typename Body>
void for_each_row_block(const at::Device& device, int64_t m, int64_t columns, bool whole,
                        const Body& body) {
  const int64_t elements = block_elements(device);
  const int64_t fitting = std::max<int64_t>(1, elements / std::max<int64_t>(1, columns));
  const int64_t block = whole ? std::max<int64_t>(1, m) : fitting;
  for (int64_t row = 0; row < m; row += block) {
    body(row, std::min(block, m - row));
  }
}

// An M×C matrix seen in `dtype`, with dropout where one is given. Borrows both.
class Rows {
 public:
  Rows(const at::Tensor& matrix, at::ScalarType dtype, const Dropout* dropout = nullptr)
      : matrix_(matrix),
        dtype_(dtype),
        dropout_(dropout != nullptr && dropout->active() ? dropout : nullptr) {}

  int64_t count() const { return matrix_.size(0); }
  int64_t columns() const { return matrix_.size(1); }
  at::ScalarType dtype() const { return dtype_; }
  at::Device device() const { return matrix_.device(); }
  at::TensorOptions options() const { return matrix_.options(); }
  double scale() const { return dropout_ ? dropout_->scale : 1.0; }
  bool as_it_lies() const { return matrix_.scalar_type() == dtype_ && !dropout_; }

  at::Tensor block(int64_t row, int64_t rows) const {
    const at::Tensor part = rows == count() ? matrix_ : matrix_.narrow(0, row, rows);
    if (!dropout_) return part.to(dtype_);
    return at::mul(part.to(dtype_), dropout_->mask(row, rows, columns(), dtype_));
  }

 private:
  const at::Tensor& matrix_;
  at::ScalarType dtype_;
  const Dropout* dropout_;
};

}  // namespace fused_lora::composed
