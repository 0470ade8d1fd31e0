#include "cpu/fused/weight_panels.h"

#include <algorithm>

#include "cpu/fused/parallel.h"

namespace fused_lora::cpu::fused {
namespace {

// fp32 elements lie alone, bf16 ones in pairs.
template <typename T>
constexpr int64_t kNeighbours = sizeof(T) == sizeof(float) ? 1 : 2;

// Elements of a cache line.
template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);

// Calls copy(n, k, k_end, place) for 32 rows of W from n on, a cache line of each, and the place of
// the first element in the panels: what is strided stays in the first cache.
template <typename T, typename Copy>
void for_each_block(int64_t out_features, int64_t in_features, const Parallel& parallel,
                    const Copy& copy) {
  run_tasks(parallel, out_features / kPanelRows, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t k = 0; k < in_features; k += kLine<T>) {
        copy(panel * kPanelRows, k, std::min(in_features, k + kLine<T>),
             kPanelRows * (panel * in_features + k));
      }
    }
  });
}

// As many rows as a panel's are too many for the processor to foresee by itself.
constexpr int64_t kLinesAhead = 4;

template <typename T>
void pack(const MatrixView& weight, int64_t out_features, int64_t in_features, void* panels,
          const Parallel& parallel) {
  constexpr int64_t kTogether = kNeighbours<T>;
  const auto* from = static_cast<const T*>(weight.data);
  auto* to = static_cast<T*>(panels);
  const int64_t row_stride = weight.row_stride, column_stride = weight.column_stride;
  for_each_block<T>(out_features, in_features, parallel,
                    [=](int64_t n, int64_t k, int64_t k_end, int64_t place) {
                      const T* block = from + n * row_stride + k * column_stride;
                      const int64_t columns = k_end - k;
                      if (column_stride == 1) {
                        for (int64_t i = 0; i < kPanelRows; ++i) {
                          const T* row = block + i * row_stride;
                          T* out = to + place + kTogether * i;
                          __builtin_prefetch(row + kLinesAhead * kLine<T>);
                          for (int64_t j = 0; j < columns; j += kTogether) {
                            for (int64_t t = 0; t < kTogether; ++t)
                              out[kPanelRows * j + t] = row[j + t];
                          }
                        }
                        return;
                      }
                      for (int64_t j = 0; j < columns; ++j) {
                        const T* column = block + j * column_stride;
                        T* out = to + place + kPanelRows * (j - j % kTogether) + j % kTogether;
                        __builtin_prefetch(column + kLine<T> * column_stride);
                        for (int64_t i = 0; i < kPanelRows; ++i)
                          out[kTogether * i] = column[i * row_stride];
                      }
                    });
}

template <typename T>
void unpack(const void* panels, int64_t out_features, int64_t in_features, void* weight,
            const Parallel& parallel) {
  constexpr int64_t kTogether = kNeighbours<T>;
  const auto* from = static_cast<const T*>(panels);
  auto* to = static_cast<T*>(weight);
  for_each_block<T>(out_features, in_features, parallel,
                    [=](int64_t n, int64_t k, int64_t k_end, int64_t place) {
                      for (int64_t i = 0; i < kPanelRows; ++i) {
                        const T* panel = from + place + kTogether * i;
                        T* row = to + (n + i) * in_features + k;
                        __builtin_prefetch(row + kLinesAhead * kLine<T>, 1);
                        for (int64_t j = 0; j < k_end - k; j += kTogether) {
                          for (int64_t t = 0; t < kTogether; ++t)
                            row[j + t] = panel[kPanelRows * j + t];
                        }
                      }
                    });
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
