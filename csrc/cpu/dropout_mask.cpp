#include "cpu/dropout_mask.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "common/dropout.h"

namespace fused_lora::cpu {
namespace {

// Philox blocks drawn together: enough independent counters for the compiler to vectorise the
// rounds.
constexpr int64_t kBatch = 16;

template <typename T>
void fill_row(T* out, int64_t columns, uint64_t seed, uint64_t row, int64_t column_offset,
              uint32_t keep) {
  uint32_t lanes[kBatch * kLanes];
  const int64_t end = column_offset + columns;
  for (int64_t block = column_offset / kLanes; block * kLanes < end; block += kBatch) {
    for (int64_t i = 0; i < kBatch; ++i) {
      const Philox4x32 words = dropout_words(seed, row, static_cast<uint64_t>(block + i));
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[i * kLanes + lane] = dropout_lane(words, lane);
      }
    }
    const int64_t first = block * kLanes;
    const int64_t from = std::max(first, column_offset);
    const int64_t to = std::min(first + kBatch * kLanes, end);
    for (int64_t column = from; column < to; ++column) {
      out[column - column_offset] = static_cast<T>(lanes[column - first] < keep ? 1.0f : 0.0f);
    }
  }
}

}  // namespace

at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t columns, double p,
                        int64_t row_offset, int64_t column_offset, at::ScalarType dtype) {
  at::Tensor mask = at::empty({rows, columns}, seed.options().dtype(dtype));
  const auto key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const uint32_t keep = DropoutRule::from_probability(p).keep;
  // Below this many elements a second thread costs more than it brings.
  constexpr int64_t kGrainElements = 8192;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));

  AT_DISPATCH_FLOATING_TYPES_AND3(
      at::kBool, at::kHalf, at::kBFloat16, dtype, "fused_lora::dropout_mask", [&] {
        auto* out = mask.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            fill_row(out + row * columns, columns, key, static_cast<uint64_t>(row_offset + row),
                     column_offset, keep);
          }
        });
      });
  return mask;
}

}  // namespace fused_lora::cpu
