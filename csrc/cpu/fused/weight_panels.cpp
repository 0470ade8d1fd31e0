#include "cpu/fused/weight_panels.h"

#include <algorithm>

#include "cpu/fused/parallel.h"

namespace fused_lora::cpu::fused {
namespace {

// Calls copy(n, k, place) for every element of W and its place in the panels: for a cache line of a
// row at a time, so that what is strided stays in the first cache.
template <int kNeighbours, typename Copy>
void for_each(int64_t out_features, int64_t in_features, const Parallel& parallel,
              const Copy& copy) {
  constexpr int64_t kLine = 64 / sizeof(float) * kNeighbours;
  run_tasks(parallel, out_features / kPanelRows, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanelRows * in_features;
      for (int64_t line = 0; line < in_features; line += kLine) {
        const int64_t line_end = std::min(in_features, line + kLine);
        for (int64_t n = 0; n < kPanelRows; ++n) {
          for (int64_t k = line; k < line_end; k += kNeighbours) {
            for (int64_t i = 0; i < kNeighbours; ++i) {
              copy(panel * kPanelRows + n, k + i, first + kPanelRows * k + kNeighbours * n + i);
            }
          }
        }
      }
    }
  });
}

// fp32 elements lie alone, bf16 ones in pairs.
template <typename T>
constexpr int kNeighboursOf = sizeof(T) == sizeof(float) ? 1 : 2;

template <typename T>
void pack(const MatrixView& weight, int64_t out_features, int64_t in_features, void* panels,
          const Parallel& parallel) {
  const auto* from = static_cast<const T*>(weight.data);
  auto* to = static_cast<T*>(panels);
  for_each<kNeighboursOf<T>>(out_features, in_features, parallel,
                             [&](int64_t n, int64_t k, int64_t place) {
                               to[place] = from[n * weight.row_stride + k * weight.column_stride];
                             });
}

template <typename T>
void unpack(const void* panels, int64_t out_features, int64_t in_features, void* weight,
            const Parallel& parallel) {
  const auto* from = static_cast<const T*>(panels);
  auto* to = static_cast<T*>(weight);
  for_each<kNeighboursOf<T>>(
      out_features, in_features, parallel,
      [&](int64_t n, int64_t k, int64_t place) { to[n * in_features + k] = from[place]; });
}

}  // namespace

void pack_weight(const MatrixView& weight, int64_t out_features, int64_t in_features, DType dtype,
                 void* panels, const Parallel& parallel) {
  const auto pack_as = dtype == DType::kFloat32 ? pack<uint32_t> : pack<uint16_t>;
  pack_as(weight, out_features, in_features, panels, parallel);
}

void unpack_weight(const void* panels, int64_t out_features, int64_t in_features, DType dtype,
                   void* weight, const Parallel& parallel) {
  const auto unpack_as = dtype == DType::kFloat32 ? unpack<uint32_t> : unpack<uint16_t>;
  unpack_as(panels, out_features, in_features, weight, parallel);
}

}  // namespace fused_lora::cpu::fused
