// What calls are made of: operands, products run on the caller's threads, and memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>

#include "cpu/fused/product.h"

namespace fused_lora::cpu::fused {

const Kernels& kernels_of(Level level);

// Memory that is kept between uses, its contents arbitrary.
class Kept {
 public:
  void* of(int64_t bytes) {
    if (held_ < bytes) {
      memory_.reset();
      held_ = 0;
      void* allocated = nullptr;
      if (posix_memalign(&allocated, 64, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
      memory_.reset(allocated);
      held_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t held_ = 0;
};

void run_product(const Product& product, const Kernels& kernels, const Parallel& parallel);
// Products that do not depend on each other, but for those that follow the product before them.
void run_products(std::span<const Product> products, const Kernels& kernels,
                  const Parallel& parallel);

Operand operand(const MatrixView& view, DType dtype);
Operand dense(const void* data, int64_t columns, DType dtype);
Operand transposed(Operand strided);
// fp32 of any strides, rounded to bf16 along whichever dimension lies contiguous.
Operand rounded(const MatrixView& view, int64_t rows, int64_t columns, const Kernels& kernels,
                uint16_t* to);
// W as the right operand of dx, or transposed, of y.
Operand weight(const Problem& p, const MatrixView& view, bool transposed);

// The frozen products, x Wᵀ + b and dy W.
Product frozen_forward(const Problem& p, const Operand& x, const MatrixView& weight,
                       const void* bias, void* y);
Product frozen_backward(const Problem& p, const Operand& dy, const MatrixView& weight, void* dx);
// To a frozen product the low-rank one, h Bᵀ or g A. low: rows×rank, factor: rank×columns.
void add_tail(Product* product, int64_t rank, const Operand& low, const Operand& factor);

// rows · factor, times alpha: h and g.
Product rank_down(const Problem& p, const Operand& rows, int64_t depth, const Operand& factor,
                  float alpha, const Output& out);
// lowᵀ · rows, over all rows: dA, and dB transposed.
Product rank_grad(const Problem& p, const Operand& low, const Operand& rows, int64_t columns,
                  const Output& out);

// Draws the mask of x once for the products of a call, in memory of the calling thread: an eighth
// of a byte for an element. order: the rows in the products' order, M of them; null: as they lie.
Mask drawn_mask(const Problem& p, const Dropout& dropout, const Kernels& kernels,
                const Parallel& parallel, const int64_t* order = nullptr);
// Lets a drawn mask fall on an operand of a product.
void mask(Product* product, MaskOn where, const Dropout& dropout, const Mask& drawn);

}  // namespace fused_lora::cpu::fused
