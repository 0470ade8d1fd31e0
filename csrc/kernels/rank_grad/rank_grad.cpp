#include "kernels/rank_grad/rank_grad.h"

#include <algorithm>
#include <cstdint>

#include "kernels/alignment.h"
#include "kernels/rank_grad/rank_grad_sm80.h"
#include "kernels/rank_grad/shapes.h"

namespace fused_lora::kernels {

namespace {

const char* long_operand_obstacle(const RankGrad& stage) {
  if (stage.arithmetic == Arithmetic::kFloat32) return "fp32 arithmetic has no matrix units";
  if (stage.low_stride > INT32_MAX) return "the rows of h lie 2^31 elements or more apart";
  return row_obstacle(stage.x, stage.rows, stage.columns, bytes_of(stage.dtype), kOfX);
}

int64_t slices_of(const RankGrad& stage) {
  return std::max<int64_t>(ceil_div(stage.rows, rank_grad::kSliceRows), 1);
}

}  // namespace

const char* rank_grad_obstacle(const RankGrad& stage) {
  return long_operand_obstacle(stage);
}

int rank_grad_splits(const RankGrad* stages, int count, const Device& device) {
  const RankGrad& stage = stages[0];
  int64_t most = 0, all = 0, rank_tiles = 0;
  for (int i = 0; i < count; ++i) {
    most = std::max(most, stages[i].rank);
    all += stages[i].rank;
  }
  const int ranks = rank_grad::rank_tile(most);
  for (int i = 0; i < count; ++i) rank_tiles += ceil_div(stages[i].rank, ranks);
  const int64_t size = bytes_of(stage.dtype);
  const int64_t row_tiles =
      ceil_div(stage.rows, rank_grad::row_tile(ranks, static_cast<int>(size)));
  const int64_t blocks = ceil_div(stage.columns, rank_grad::column_tile(ranks)) * rank_tiles;
  if (row_tiles <= 1 || blocks == 0) return 1;
  // One wave of two blocks an SM. Partial sums are written and read, in fp32: at most half X's
  // bytes.
  const int64_t fill = 2 * device.multiprocessors / blocks;
  const int64_t cheap = stage.rows * size / (2 * 8 * all);
  const int64_t wanted = std::max<int64_t>(std::min({fill, cheap, row_tiles}), 1);
  // Equal shares of whole tiles, none of them empty.
  return static_cast<int>(ceil_div(row_tiles, ceil_div(row_tiles, wanted)));
}

cudaError_t launch_rank_grad(const RankGrad* stages, int count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  switch (stages[0].dtype) {
    case DType::kBFloat16:
      return launch_rank_grad_bf16_sm80(stages, count, stream);
    case DType::kFloat16:
      return launch_rank_grad_fp16_sm80(stages, count, stream);
    default:
      return launch_rank_grad_fp32_sm80(stages, count, stream);
  }
}

// A second read of dy is rows·columns·size bytes; partial sums of dB are slices·columns·rank·4
// bytes written and as many read.
const char* rank_down_grad_obstacle(const RankDownGrad& stage) {
  const RankGrad& grad = stage.grad;
  if (const char* obstacle = long_operand_obstacle(grad)) return obstacle;
  if (grad.rank > 32) return "g and dB of more than 32 ranks do not fit a block's registers";
  if (grad.arithmetic == Arithmetic::kHalfMasters && grad.rank > 16) {
    return "with fp32 masters the matrix units take longer than a second read of dy past rank 16";
  }
  const int64_t slices = slices_of(grad);
  if (slices > 1 && slices * grad.rank * 8 > grad.rows * bytes_of(grad.dtype)) {
    return "partial sums of dB would be more bytes than a second read of dy";
  }
  return nullptr;
}

int rank_down_grad_splits(const RankDownGrad& stage, const Device&) {
  return static_cast<int>(slices_of(stage.grad));
}

cudaError_t launch_rank_down_grad(const RankDownGrad& stage, cudaStream_t stream) {
  // The shares of the rows must be those that the kernel makes; the sums of several need partials.
  const int64_t slices = slices_of(stage.grad);
  if (stage.grad.splits != slices || (slices > 1 && stage.grad.partials == nullptr)) {
    return cudaErrorInvalidValue;
  }
  switch (stage.grad.dtype) {
    case DType::kBFloat16:
      return launch_rank_down_grad_bf16_sm80(stage, stream);
    case DType::kFloat16:
      return launch_rank_down_grad_fp16_sm80(stage, stream);
    default:
      return launch_rank_down_grad_fp32_sm80(stage, stream);
  }
}

}  // namespace fused_lora::kernels
