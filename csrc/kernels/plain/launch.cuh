// What the plain launchers share: the tiles to choose from, and the element type at compile time.
#pragma once

#include "kernels/element.h"
#include "kernels/plain/tile.cuh"
#include "kernels/stages.h"

namespace fused_lora::kernels::plain {

// Much to compute: 64 products for each 16 elements read from shared memory.
using WideTile = Tile<128, 128, 16, 8>;
// Fewer columns, or too few blocks of WideTile to fill a device.
using SquareTile = Tile<64, 64, 32, 4>;
// C is as narrow as a usual rank: few of its columns are computed in vain.
using NarrowTile = Tile<64, 32, 32, 4>;
// Few rows: eight warps share the reduction of a small tile.
using LowTile = Tile<16, 32, 64, 4>;
// The same for rank-down, whose blocks are then few as well: longer runs hide more of the latency.
using LowDeepTile = Tile<16, 32, 128, 4>;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename T>
constexpr int64_t tiles(int64_t rows, int64_t columns) {
  return ceil_div(rows, T::kRows) * ceil_div(columns, T::kColumns);
}

// As many blocks as the multiprocessors of a large device. A launcher does not ask which device it
// is: a tile too small costs bandwidth of the L2, one too large leaves multiprocessors idle.
constexpr int64_t kManyBlocks = 128;

// f(T()) with the C++ type of a dtype.
template <typename F>
cudaError_t with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kBFloat16:
      return f(bf16());
    case DType::kFloat16:
      return f(fp16());
  }
  return cudaErrorInvalidValue;
}

inline DType rank_dtype(Arithmetic arithmetic, DType dtype) {
  return arithmetic == Arithmetic::kHalf ? dtype : DType::kFloat32;
}

}  // namespace fused_lora::kernels::plain
