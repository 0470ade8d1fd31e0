// A C interface to csrc/kernels/plain for test_plain.py.
#include "kernels/plain/plain.h"

namespace k = fused_lora::kernels;

extern "C" {

size_t RankDown_bytes() {
  return sizeof(k::RankDown);
}
size_t LoraGemm_bytes() {
  return sizeof(k::LoraGemm);
}
size_t RankGrad_bytes() {
  return sizeof(k::RankGrad);
}
size_t MaskCall_bytes() {
  return sizeof(k::MaskCall);
}
size_t Device_bytes() {
  return sizeof(k::Device);
}

int rank_down(const k::RankDown* stage) {
  return k::launch_plain_rank_down(*stage, nullptr);
}
int lora_gemm(const k::LoraGemm* stage) {
  return k::launch_plain_lora_gemm(*stage, nullptr);
}
int rank_grad(const k::RankGrad* stages, int count) {
  return k::launch_plain_rank_grad(stages, count, nullptr);
}
int rank_grad_splits(const k::RankGrad* stage, const k::Device* device) {
  return k::plain_rank_grad_splits(*stage, *device);
}
int dropout_mask(const k::MaskCall* call) {
  return k::run(*call, nullptr);
}
int current_device(k::Device* device) {
  return k::current_device(device);
}

}  // extern "C"
