// A C interface to csrc/kernels/rank_grad for test_rank_grad.py and test_rank_down_grad.py.
#include "kernels/rank_grad/rank_grad.h"

namespace k = fused_lora::kernels;

extern "C" {

size_t RankGrad_bytes() {
  return sizeof(k::RankGrad);
}
size_t RankDownGrad_bytes() {
  return sizeof(k::RankDownGrad);
}
size_t Partials_bytes() {
  return sizeof(k::Partials);
}
size_t Device_bytes() {
  return sizeof(k::Device);
}

const char* rank_grad_obstacle(const k::RankGrad* stage) {
  return k::rank_grad_obstacle(*stage);
}
int rank_grad_splits(const k::RankGrad* stages, int count, const k::Device* device) {
  return k::rank_grad_splits(stages, count, *device);
}
int rank_grad(const k::RankGrad* stages, int count) {
  return k::launch_rank_grad(stages, count, nullptr);
}

const char* rank_down_grad_obstacle(const k::RankDownGrad* stage) {
  return k::rank_down_grad_obstacle(*stage);
}
int rank_down_grad_splits(const k::RankDownGrad* stage, const k::Device* device) {
  return k::rank_down_grad_splits(*stage, *device);
}
int rank_down_grad(const k::RankDownGrad* stage) {
  return k::launch_rank_down_grad(*stage, nullptr);
}

int reduce_partials(const k::Partials* outputs, int count) {
  return k::launch_reduce_partials(outputs, count, nullptr);
}
int64_t packed_rank(int arithmetic, int64_t rank) {
  return k::packed_rank(static_cast<k::Arithmetic>(arithmetic), rank);
}

}  // extern "C"
