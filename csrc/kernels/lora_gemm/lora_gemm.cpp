#include "kernels/lora_gemm/lora_gemm.h"

#include <algorithm>
#include <limits>

#include "kernels/alignment.h"
#include "kernels/lora_gemm/instances.h"

namespace fused_lora::kernels {
namespace lora_gemm {

TileName choose_tile(int64_t rows, int64_t columns, Arithmetic arithmetic, const Device& device) {
  TileName best = TileName::kLarge;
  double least = std::numeric_limits<double>::infinity();
  for (const TileName name : kTileNames) {
    const Tile& tile = tile_of(name, arithmetic);
    const int64_t tiles = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns);
    const double busiest = static_cast<double>(ceil_div(tiles, device.multiprocessors)) *
                           tile.rows * tile.columns / tile.efficiency;
    if (busiest < least) {
      least = busiest;
      best = name;
    }
  }
  return best;
}

namespace {

// 2^result rows of tiles run together: at most eight, and no more than there are.
int group_shift(int64_t row_tiles) {
  constexpr int kMost = 3;
  int shift = 0;
  while (shift < kMost && (int64_t{1} << shift) < row_tiles) ++shift;
  return shift;
}

}  // namespace
}  // namespace lora_gemm

// Where both strides are 1 (a single row or column) either reading is right. Where there is no W
// the packed factor is as one whose reduction is contiguous, which may have any number of columns.
bool lora_gemm_depth_contiguous(const LoraGemm& stage) {
  return stage.depth == 0 || stage.weight.row_stride == 1;
}

const char* lora_gemm_obstacle(const LoraGemm& stage) {
  const int64_t bytes = bytes_of(stage.dtype);
  const int64_t largest = int64_t{65535} * lora_gemm::kFewRows.rows;  // a grid's y, and int offsets
  if (stage.arithmetic == Arithmetic::kFloat32) return "fp32 arithmetic has no matrix units";
  if (stage.rows > largest || stage.columns > largest || stage.depth > largest)
    return "a dimension is beyond the grid's limits";
  if (stage.depth == 0) return nullptr;
  if (const char* obstacle = row_obstacle(stage.x, stage.rows, stage.depth, bytes, kOfX))
    return obstacle;
  if (stage.weight.row_stride != 1 && stage.weight.column_stride != 1)
    return "neither dimension of the weight is contiguous";
  // A tile's offsets count chunks in 32 bits: 128 rows of less than 512 MiB.
  constexpr int64_t kFurthest = int64_t{1} << 29;
  const int64_t weight_pitch = std::max(stage.weight.row_stride, stage.weight.column_stride);
  if (std::max(stage.x.row_stride, weight_pitch) * bytes >= kFurthest)
    return "rows lie 512 MiB or more apart";
  return lora_gemm_depth_contiguous(stage)
             ? row_obstacle(stage.weight.transposed(), stage.columns, stage.depth, bytes, kOfWeight)
             : row_obstacle(stage.weight, stage.depth, stage.columns, bytes, kOfWeight);
}

cudaError_t launch_lora_gemm(const LoraGemm& stage, lora_gemm::TileName name, cudaStream_t stream) {
  using namespace lora_gemm;
  if (stage.rows == 0 || stage.columns == 0) return cudaSuccess;
  const int64_t bytes = bytes_of(stage.dtype),
                packed_bytes = packed_element_bytes(stage.arithmetic);
  const bool contiguous = lora_gemm_depth_contiguous(stage);
  const int64_t depth = packed_rank(stage.arithmetic, stage.rank);
  Params params = {};
  params.x = stage.x.data;
  params.x_pitch = stage.x.row_stride * bytes;
  params.weight = stage.weight.data;
  params.weight_pitch = (contiguous ? stage.weight.column_stride : stage.weight.row_stride) * bytes;
  params.low = stage.packed_low;
  params.low_pitch = depth * packed_bytes;
  params.factor = stage.packed_factor;
  params.factor_pitch = stage.packed_factor_stride * packed_bytes;
  params.bias = stage.bias;
  params.row_adapters = stage.row_adapters;
  params.addend = stage.addend;
  params.addend_pitch = stage.addend_stride * bytes;
  params.out = stage.out;
  params.out_pitch = stage.out_stride * bytes;
  params.rows = static_cast<int>(stage.rows);
  params.columns = static_cast<int>(stage.columns);
  params.depth = static_cast<int>(stage.depth);
  params.rank = static_cast<int>(stage.rank);
  params.parts = packed_parts(stage.arithmetic);
  params.group_shift = group_shift(ceil_div(stage.rows, tile_of(name, stage.arithmetic).rows));
  params.dropout = stage.dropout;
  switch (stage.dtype) {
    case DType::kBFloat16:
      return launch_bf16(params, name, contiguous, stream);
    case DType::kFloat16:
      return stage.arithmetic == Arithmetic::kHalfMasters
                 ? launch_fp16_masters(params, name, contiguous, stream)
                 : launch_fp16(params, name, contiguous, stream);
    default:
      return launch_tf32(params, name, contiguous, stream);
  }
}

}  // namespace fused_lora::kernels
