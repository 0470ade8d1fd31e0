// An operand of wgmma in shared memory.
#pragma once

#include <bitset>
#include <cstdint>
#include <vector>

#include "memory/shared_memory.h"
#include "tensor_core/formats.h"
#include "tensor_core/swizzle.h"

namespace emulator {

constexpr int kMaxColumns = 256;  // of wgmma's B and D

// A warp's rows of A (rows × k), or the whole of Bᵀ (n × k).
struct SharedOperand {
  static constexpr uint32_t kChunk = 16;  // bytes that are contiguous in every layout

  using Rows = std::bitset<kMaxColumns>;
  struct Range {
    uint32_t begin, end;  // addresses
  };

  MatrixDescriptor matrix;
  bool mn_major;
  TensorFormat format;
  uint32_t first_row, rows, k;

  // Its bytes, in ascending order.
  std::vector<Range> ranges() const;
  // Reads it into values[row · row_stride + k · k_stride], times `sign`; the result has the rows
  // with something undefined. What lies outside shared memory counts as zero.
  Rows read(SharedMemory& shared, float sign, float* values, uint32_t row_stride,
            uint32_t k_stride) const;

 private:
  // Calls `visit(address, row, k)` for each chunk, whose elements follow one another along K, or
  // along the rows when the matrix is MN-major.
  template <class Visit>
  void for_each_chunk(Visit visit) const;
};

}  // namespace emulator
