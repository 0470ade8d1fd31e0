// A C interface to csrc/kernels/lora_gemm for test_lora_gemm.py.
#include "kernels/lora_gemm/lora_gemm.h"

namespace k = fused_lora::kernels;

extern "C" {

size_t LoraGemm_bytes() {
  return sizeof(k::LoraGemm);
}
size_t Device_bytes() {
  return sizeof(k::Device);
}

const char* obstacle(const k::LoraGemm* stage) {
  return k::lora_gemm_obstacle(*stage);
}
int64_t packed_rank(int arithmetic, int64_t rank) {
  return k::packed_rank(static_cast<k::Arithmetic>(arithmetic), rank);
}
int choose_tile(int64_t rows, int64_t columns, int arithmetic, const k::Device* device) {
  return static_cast<int>(
      k::lora_gemm::choose_tile(rows, columns, static_cast<k::Arithmetic>(arithmetic), *device));
}
int lora_gemm(const k::LoraGemm* stage, int tile) {
  return k::launch_lora_gemm(*stage, static_cast<k::lora_gemm::TileName>(tile), nullptr);
}

}  // extern "C"
