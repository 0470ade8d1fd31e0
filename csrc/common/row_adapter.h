// Rows of one batch that belong to different adapters, as every device's kernels take them.
//
// The adapters' A are stacked along the rank, R×K, and so are their B, N×R, R = Σ rᵢ. A row uses
// some of the ranks alone, with a scaling of its own:
//
//     h[i, c] = scaling_i · (drop(x[i]) · A[c])   for begin_i ≤ c < end_i, and 0 elsewhere
//     g[i, c] = scaling_i · (dy[i] · B[:, c])     for begin_i ≤ c < end_i, and 0 elsewhere
//
// Torch-free, host and device.
#pragma once

#include <cstdint>

namespace fused_lora {

// The ranks begin .. end-1 of the stacked adapters that one row uses, and their scaling; begin ==
// end: none.
struct RowAdapter {
  int32_t begin = 0;
  int32_t end = 0;
  float scaling = 0.0f;
};

}  // namespace fused_lora
