#include "kernels/rank_down/rank_down.h"

#include <algorithm>
#include <climits>
#include <cstdint>

#include "kernels/alignment.h"
#include "kernels/rank_down/rank_down_sm80.h"

namespace fused_lora::kernels {

namespace {

constexpr int64_t kChunk = 16;

bool on_chunk(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kChunk == 0;
}

bool on_chunk(int64_t elements, DType dtype) {
  return elements * bytes_of(dtype) % kChunk == 0;
}

// Rows that are as many as the ranks keep F's traffic at or below X's; where F is of fp32 masters
// beside a 16-bit X, twice the rows do. Taller tiles only leave fewer blocks, and wider ones than
// 64 ranks more accumulators than a thread has registers for.
constexpr RankDownTile kTiles[] = {{64, 64}, {64, 32}, {32, 32}, {32, 16}, {16, 16}};

}  // namespace

const char* rank_down_obstacle(const RankDown& stage) {
  if (stage.arithmetic == Arithmetic::kFloat32) return "fp32 arithmetic has no matrix units";
  const char* const rows =
      row_obstacle(stage.x, stage.rows, stage.columns, bytes_of(stage.dtype), kOfX);
  if (rows != nullptr) return rows;
  // The kernel counts columns in 32 bits, and counts on past the last.
  if (stage.columns > INT_MAX / 2) return "x (or dy) has more than 2^30 columns";
  return nullptr;
}

// A block's time is that of its bytes: X's at its share of the DRAM bandwidth, or X's and F's
// together at its share of the L2's, which is at least twice as high on every device since sm_80.
// The blocks' rounds over the multiprocessors multiply it.
RankDownTile choose_rank_down_tile(const RankDown* stages, int count, int multiprocessors) {
  const int64_t x_bytes = bytes_of(stages->dtype), factor_bytes = bytes_of(stages->factor_dtype);
  int64_t rank = 0;
  for (int i = 0; i < count; ++i) rank = std::max(rank, stages[i].rank);
  RankDownTile best;
  int64_t least = INT64_MAX;
  for (const RankDownTile& tile : kTiles) {
    // A tile of more ranks than the next narrower one could hold as well would be half empty.
    if (tile.ranks > 16 && tile.ranks / 2 >= rank) continue;
    int64_t rank_tiles = 0;
    for (int i = 0; i < count; ++i) rank_tiles += ceil_div(stages[i].rank, tile.ranks);
    const int64_t blocks = ceil_div(stages->rows, tile.rows) * rank_tiles;
    const int64_t x = tile.rows * x_bytes, factor = tile.ranks * factor_bytes;
    const int64_t time = ceil_div(blocks, multiprocessors) * std::max(2 * x, x + factor);
    if (time < least) {
      least = time;
      best = tile;
    }
  }
  return best;
}

FactorSource rank_down_factor_source(const RankDown& stage) {
  const MatrixView& factor = stage.factor;
  const DType dtype = stage.factor_dtype;
  if (!on_chunk(factor.data)) return FactorSource::kElements;
  const auto steps = [&](int64_t extent, int64_t stride) {
    return extent <= 1 || on_chunk(stride, dtype);
  };
  if (factor.row_stride == 1 && on_chunk(stage.columns, dtype) &&
      steps(stage.rank, factor.column_stride)) {
    return FactorSource::kDepthChunks;
  }
  if (factor.column_stride == 1 && on_chunk(stage.rank, dtype) &&
      steps(stage.columns, factor.row_stride)) {
    return FactorSource::kRankChunks;
  }
  return FactorSource::kElements;
}

// A factor whose ranks are contiguous, among others whose are not, is read element by element.
RankDownLaunch rank_down_launch(const RankDown* stages, int count, RankDownTile tile) {
  RankDownLaunch launch = {stages, count, tile};
  bool all = true;
  for (int i = 0; i < count; ++i) {
    launch.sources[i] = rank_down_factor_source(stages[i]);
    all = all && launch.sources[i] == FactorSource::kRankChunks;
  }
  for (FactorSource& source : launch.sources) {
    if (source == FactorSource::kRankChunks && !all) source = FactorSource::kElements;
  }
  return launch;
}

cudaError_t launch_rank_down(const RankDown* stages, int count, const Device& device,
                             cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const RankDownTile tile = choose_rank_down_tile(stages, count, device.multiprocessors);
  const RankDownLaunch launch = rank_down_launch(stages, count, tile);
  switch (stages->dtype) {
    case DType::kBFloat16:
      return launch_rank_down_bf16_sm80(launch, stream);
    case DType::kFloat16:
      return launch_rank_down_fp16_sm80(launch, stream);
    default:
      return launch_rank_down_fp32_sm80(launch, stream);
  }
}

}  // namespace fused_lora::kernels
