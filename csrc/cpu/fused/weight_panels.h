// A frozen weight laid out once for every call: panels of kPanelRows rows of W, so that a tile of
// the forward product reads it from beginning to end.
//
//     fp32   element (n, k) at  n / 32 · 32 K  +  32 k  +  n % 32
//     bf16   element (n, k) at  n / 32 · 32 K  +  64 (k / 2)  +  2 (n % 32)  +  k % 2
//
// in elements: bf16 in the pairs of neighbours along K that the forward dot products take. The same
// at every level, and of exactly W's bytes.
#pragma once

#include <cstdint>

#include "cpu/fused/lora_linear.h"

namespace fused_lora::cpu::fused {

constexpr int64_t kPanelRows = 32;

// Whether a weight N×K can be laid out so: whole panels, and whole pairs.
inline bool fits_panels(int64_t out_features, int64_t in_features) {
  return out_features % kPanelRows == 0 && in_features % 2 == 0;
}

// weight: N×K of dtype, of any strides. panels: N·K elements, aligned to 64 bytes.
void pack_weight(const MatrixView& weight, int64_t out_features, int64_t in_features, DType dtype,
                 void* panels, const Parallel& parallel);
// weight: N×K of dtype, dense by rows.
void unpack_weight(const void* panels, int64_t out_features, int64_t in_features, DType dtype,
                   void* weight, const Parallel& parallel);

}  // namespace fused_lora::cpu::fused
