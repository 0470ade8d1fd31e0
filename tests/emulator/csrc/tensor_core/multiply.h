// The arithmetic of tensor cores on one warp's tile, D = A·B + C.
#pragma once

#include "tensor_core/formats.h"

namespace emulator {

// How products are summed. By default in fp32, in the order of k, each addition rounded to nearest.
//
// Real tensor cores sum blocks of k at a time: every product and the accumulator are aligned to the
// largest exponent among them, truncated to `fraction_bits` below it, added exactly, and the sum is
// rounded toward zero to fp32, or to nearest to fp16. The rule and its constants per architecture
// are those that PyPI's `mmasim` found by experiment.
struct Summation {
  int fraction_bits = 0;  // 0: plain fp32
  int block_bytes = 0;    // of a row of A

  static constexpr Summation truncating(int compute_capability_major) {
    return compute_capability_major < 9 ? Summation{24, 16} : Summation{25, 32};
  }
};

// d (16×n) += a (16×k) · b (k×n), row-major, n a multiple of 8. `half`: d holds fp16 values.
void multiply(TensorFormat format, bool half, const Summation& summation, const float* a,
              const float* b, float* d, int n, int k);

}  // namespace emulator
