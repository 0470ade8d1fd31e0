// A C interface to csrc/kernels/rank_down for test_rank_down.py.
#include "kernels/rank_down/rank_down.h"
#include "kernels/rank_down/rank_down_sm80.h"

namespace k = fused_lora::kernels;

extern "C" {

size_t RankDown_bytes() {
  return sizeof(k::RankDown);
}
size_t Device_bytes() {
  return sizeof(k::Device);
}

const char* obstacle(const k::RankDown* stage) {
  return k::rank_down_obstacle(*stage);
}
int64_t packed_rank(int arithmetic, int64_t rank) {
  return k::packed_rank(static_cast<k::Arithmetic>(arithmetic), rank);
}
// rows · 1000 + ranks
int choose_tile(const k::RankDown* stage, int multiprocessors) {
  const k::RankDownTile tile = k::choose_rank_down_tile(stage, 1, multiprocessors);
  return tile.rows * 1000 + tile.ranks;
}
int factor_source(const k::RankDown* stage) {
  return static_cast<int>(k::rank_down_factor_source(*stage));
}
int rank_down(const k::RankDown* stages, int count, const k::Device* device) {
  return k::launch_rank_down(stages, count, *device, nullptr);
}
int rank_down_by_tile(const k::RankDown* stages, int count, int rows, int ranks) {
  const auto launch = stages->dtype == k::DType::kBFloat16  ? k::launch_rank_down_bf16_sm80
                      : stages->dtype == k::DType::kFloat16 ? k::launch_rank_down_fp16_sm80
                                                            : k::launch_rank_down_fp32_sm80;
  return launch(k::rank_down_launch(stages, count, {rows, ranks}), nullptr);
}

}  // extern "C"
