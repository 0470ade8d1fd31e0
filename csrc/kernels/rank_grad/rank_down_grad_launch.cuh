// From a stage to a launch of rank_down_grad.cuh's kernel.
#pragma once

#include "kernels/alignment.h"
#include "kernels/rank_grad/rank_down_grad.cuh"

namespace fused_lora::kernels::rank_grad {

inline PackFactorParams partner_params(const PackFactor& partner, Arithmetic arithmetic) {
  if (partner.packed == nullptr) return {};
  return {partner.factor,
          partner.factor_dtype,
          partner.extent,
          static_cast<int>(partner.rank),
          static_cast<int>(packed_rank(arithmetic, partner.rank)),
          partner.depth_contiguous,
          partner.stride,
          partner.packed,
          ceil_div(partner.extent, kPackExtent) * ceil_div(partner.rank, kPackRanks)};
}

template <typename Traits>
cudaError_t launch_down_grad(const RankDownGrad& stage, cudaStream_t stream) {
  const RankDown& down = stage.down;
  const RankGrad& grad = stage.grad;
  DownGradParams p{};
  p.dy = grad.x.data;
  p.dy_pitch = grad.x.row_stride * static_cast<int64_t>(sizeof(typename Traits::T));
  p.rows = grad.rows;
  p.columns = grad.columns;
  p.rank = static_cast<int>(grad.rank);
  p.tiles = static_cast<int>(ceil_div(grad.columns, Traits::kColumns));
  p.row_adapters = down.row_adapters;
  p.factor = down.factor.data;
  p.factor_is_half = down.factor_dtype != DType::kFloat32;
  p.factor_row = down.factor.row_stride * bytes_of(down.factor_dtype);
  p.factor_column = down.factor.column_stride * bytes_of(down.factor_dtype);
  p.down_alpha = down.alpha;
  p.out = down.out;
  p.packed = down.packed;
  p.packed_rank = static_cast<int>(packed_rank(down.arithmetic, down.rank));
  p.low = thin_of(grad, sizeof(typename Traits::Low));
  p.grad_alpha = grad.alpha;
  p.grad = grad.partials != nullptr ? grad.partials : grad.out;
  p.grad_dtype = grad.partials != nullptr ? DType::kFloat32 : grad.out_dtype;
  p.grad_column_stride = grad.transposed ? 1 : grad.rank;
  p.grad_rank_stride = grad.transposed ? grad.columns : 1;
  p.grad_slice = grad.columns * grad.rank;
  constexpr int kNeighbours = 2 * Traits::kGradFragments;
  p.store_vectors = !grad.transposed && p.grad_dtype == DType::kFloat32 &&
                    grad.rank % kNeighbours == 0 &&
                    reinterpret_cast<uintptr_t>(p.grad) % (kNeighbours * sizeof(float)) == 0;
  p.slices = grad.splits;
  p.partner = partner_params(down.partner, down.arithmetic);

  const int64_t blocks = p.slices + p.partner.blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = down_grad_kernel<Traits>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, Traits::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, Arithmetic kArithmetic>
cudaError_t launch_down_grad_ranks(const RankDownGrad& stage, cudaStream_t stream) {
  // Past 16 ranks fp32 masters are an obstacle.
  if constexpr (kArithmetic != Arithmetic::kHalfMasters) {
    if (stage.grad.rank > 16) {
      return launch_down_grad<DownGradTraits<T, kArithmetic, 32>>(stage, stream);
    }
  }
  return launch_down_grad<DownGradTraits<T, kArithmetic, 16>>(stage, stream);
}

// T: bf16 or fp16.
template <typename T>
cudaError_t launch_down_grad_half(const RankDownGrad& stage, cudaStream_t stream) {
  return stage.grad.arithmetic == Arithmetic::kHalf
             ? launch_down_grad_ranks<T, Arithmetic::kHalf>(stage, stream)
             : launch_down_grad_ranks<T, Arithmetic::kHalfMasters>(stage, stream);
}

}  // namespace fused_lora::kernels::rank_grad
