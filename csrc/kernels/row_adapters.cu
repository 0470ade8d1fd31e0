// What rows use of the stacked adapters, from their indices. A thread writes one row.
#include "kernels/row_adapters.h"

#include <algorithm>

namespace fused_lora::kernels {
namespace {

constexpr int kThreads = 256;
// Of a launch: what is given by value reaches the kernel without a copy, and a graph that captures
// the launch keeps it. Parameters of 4 KiB are what every device takes.
constexpr int64_t kEntries = 256;

struct Table {
  RowAdapter entries[kEntries];
};

// Rows of the `count` adapters from `first` on; and with the first of all, rows of none.
__global__ void __launch_bounds__(kThreads)
    row_adapters_kernel(const int64_t* index, int64_t rows, const Table table, int64_t first,
                        int64_t count, RowAdapter* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  const int64_t entry = index[row] - first;
  if (entry >= 0 && entry < count) {
    out[row] = table.entries[entry];
  } else if (first == 0) {
    out[row] = RowAdapter{};
  }
}

}  // namespace

cudaError_t run(const RowAdaptersCall& call, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((call.rows + kThreads - 1) / kThreads);
  for (int64_t first = 0; first < std::max<int64_t>(1, call.count); first += kEntries) {
    Table table = {};
    const int64_t count = std::min(kEntries, call.count - first);
    std::copy_n(call.adapters + first, count, table.entries);
    row_adapters_kernel<<<blocks, kThreads, 0, stream>>>(call.index, call.rows, table, first, count,
                                                         call.out);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fused_lora::kernels
