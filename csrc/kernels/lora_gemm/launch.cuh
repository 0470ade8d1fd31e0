// From a tile's name and W's layout to the kernel compiled for them.
#pragma once

#include "kernels/alignment.h"
#include "kernels/lora_gemm/instances.h"
#include "kernels/lora_gemm/lora_gemm.cuh"

namespace fused_lora::kernels::lora_gemm {

template <typename Traits>
cudaError_t launch_kernel(const Params& params, cudaStream_t stream) {
  // Up to this much dynamic shared memory no kernel has to opt in.
  static_assert(Traits::kSharedBytes <= 48 * 1024, "the stages fit without an attribute");
  const int64_t row_tiles = ceil_div(params.rows, Traits::kTile.rows);
  const int64_t column_tiles = ceil_div(params.columns, Traits::kTile.columns);
  const dim3 grid(static_cast<unsigned>(column_tiles << params.group_shift),
                  static_cast<unsigned>(ceil_div(row_tiles, int64_t{1} << params.group_shift)));
  kernel<Traits><<<grid, Traits::kThreads, Traits::kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, typename Packed, bool kDepthContiguous>
cudaError_t launch_tile(const Params& params, TileName tile, cudaStream_t stream) {
  switch (tile) {
    case TileName::kLarge:
      if constexpr (sizeof(T) == 4) {
        return launch_kernel<Traits<T, Packed, kDepthContiguous, kLargeTf32>>(params, stream);
      } else {
        return launch_kernel<Traits<T, Packed, kDepthContiguous, kLarge>>(params, stream);
      }
    case TileName::kMedium:
      return launch_kernel<Traits<T, Packed, kDepthContiguous, kMedium>>(params, stream);
    default:
      return launch_kernel<Traits<T, Packed, kDepthContiguous, kFewRows>>(params, stream);
  }
}

template <typename T, typename Packed>
cudaError_t launch(const Params& params, TileName tile, bool depth_contiguous,
                   cudaStream_t stream) {
  return depth_contiguous ? launch_tile<T, Packed, true>(params, tile, stream)
                          : launch_tile<T, Packed, false>(params, tile, stream);
}

}  // namespace fused_lora::kernels::lora_gemm
