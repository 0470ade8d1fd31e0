// Which tiles of the packed low-rank operands a CTA multiplies: those that hold a rank that its
// rows use. Where rows have no adapters of their own, all of them.
#pragma once

#include "kernels/lora_gemm/params.h"
#include "kernels/stages.h"
#include "kernels/tile/rank_window.cuh"

namespace fused_lora::kernels::lora_gemm {

// The packed depth is p.parts times the ranks (stages.h), so a window of ranks is as many runs of
// tiles. Where two share a tile it is the first one's.
template <int kDepth>
class RankTiles {
 public:
  // A whole warp calls it, and every lane has the same.
  __device__ RankTiles(const Params& p, int first_row, int rows)
      : window_(window_of_rows(p.row_adapters, first_row, rows, {0, p.rank})) {
    int next = 0;
#pragma unroll
    for (int part = 0; part < kMostParts; ++part) {
      const int first = max((part * p.rank + window_.begin) / kDepth, next);
      run_[part] = count_;
      skipped_[part] = first - count_;
      if (part < p.parts && !window_.empty()) {
        next = (part * p.rank + window_.end - 1) / kDepth + 1;
        count_ += next - first;
      }
    }
  }

  __device__ const RankWindow& window() const { return window_; }
  __device__ int count() const { return count_; }

  // The `index`-th of them, as a tile of the packed operands.
  __device__ int tile(int index) const {
    int skipped = skipped_[0];
#pragma unroll
    for (int part = 1; part < kMostParts; ++part) {
      if (index >= run_[part]) skipped = skipped_[part];
    }
    return index + skipped;
  }

 private:
  static constexpr int kMostParts = packed_parts(Arithmetic::kHalfMasters);

  const RankWindow window_;
  int count_ = 0;
  int run_[kMostParts];      // index of a run's first tile
  int skipped_[kMostParts];  // tiles before it that are not multiplied
};

}  // namespace fused_lora::kernels::lora_gemm
