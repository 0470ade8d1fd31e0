// The ranks that rows use, where every row has an adapter of its own (common/row_adapter.h).
#pragma once

#include <cstdint>

#include "common/row_adapter.h"

namespace fused_lora::kernels {

// Ranks begin .. end-1; none where begin >= end.
struct RankWindow {
  int begin, end;

  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ int size() const { return max(end - begin, 0); }
  __device__ __forceinline__ bool has(int rank) const { return begin <= rank && rank < end; }
  // Whether it has any of the `count` ranks from `first` on.
  __device__ __forceinline__ bool overlaps(int first, int count) const {
    return !empty() && begin < first + count && first < end;
  }
};

// A row's ranks, of those that there are; all of them where rows have no adapters of their own.
__device__ __forceinline__ RankWindow window_of_row(const RowAdapter* adapters, int64_t row,
                                                    int rank) {
  if (adapters == nullptr) return {0, rank};
  return {max(adapters[row].begin, 0), min(adapters[row].end, rank)};
}

__device__ __forceinline__ float scaling_of_row(const RowAdapter* adapters, int64_t row) {
  return adapters == nullptr ? 1.0f : adapters[row].scaling;
}

// From the first to the last of the ranks `within` that any of `rows` rows uses. A whole warp calls
// it, and every lane has the answer.
__device__ __forceinline__ RankWindow window_of_rows(const RowAdapter* adapters, int64_t first_row,
                                                     int rows, const RankWindow& within) {
  if (adapters == nullptr) return within;
  constexpr uint32_t kWarp = 0xffffffffu;
  RankWindow all = {within.end, within.begin};
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32; i < rows; i += 32) {
    const RankWindow row = window_of_row(adapters, first_row + i, within.end);
    const int begin = max(row.begin, within.begin);
    if (begin >= row.end) continue;
    all.begin = min(all.begin, begin);
    all.end = max(all.end, row.end);
  }
  return {__reduce_min_sync(kWarp, all.begin), __reduce_max_sync(kWarp, all.end)};
}

}  // namespace fused_lora::kernels
