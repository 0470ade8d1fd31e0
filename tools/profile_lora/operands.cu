#include <cmath>
#include <stdexcept>
#include <string>

#include "common/dropout.h"
#include "kernels/element.h"
#include "profile_lora/operands.h"

namespace fused_lora::profile {

using kernels::BackwardCall;
using kernels::DType;
using kernels::ForwardCall;
using kernels::MatrixView;
using kernels::Problem;

namespace {

__global__ void fill_uniform(void* data, DType dtype, int64_t count, float scale, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const uint32_t word = dropout_words(seed, 0, static_cast<uint64_t>(i)).word[0];
    const float uniform = static_cast<float>(word) / 4294967296.0f;
    kernels::store_from_float(data, dtype, i, (2.0f * uniform - 1.0f) * scale);
  }
}

// Everything of the calls but the pointers.
void describe_shapes(const Options& options, ForwardCall* forward, BackwardCall* backward) {
  const Problem& p = options.problem;
  const DropoutRule rule = DropoutRule::from_probability(options.dropout);
  forward->problem = p;
  forward->x = {nullptr, p.in_features, 1};
  forward->weight = options.weight_transposed ? MatrixView{nullptr, 1, p.out_features}
                                              : MatrixView{nullptr, p.in_features, 1};
  forward->lora_a = {nullptr, p.in_features, 1};
  forward->lora_b = {nullptr, p.rank, 1};
  forward->scaling = 2.0;
  forward->dropout.keep = rule.keep;
  forward->dropout.scale = static_cast<float>(rule.scale);
  backward->problem = p;
  backward->dy = {nullptr, p.out_features, 1};
  backward->x = forward->x;
  backward->weight = forward->weight;
  backward->lora_a = forward->lora_a;
  backward->lora_b = forward->lora_b;
  backward->scaling = forward->scaling;
  backward->dropout = forward->dropout;
}

// What both calls share lies in the same memory.
template <typename Allocate, typename Seed>
void place(const Options& options, ForwardCall* forward, BackwardCall* backward,
           const Allocate& allocate, const Seed& seed) {
  describe_shapes(options, forward, backward);
  const Problem& p = options.problem;
  const float in = 1.0f / std::sqrt(static_cast<float>(p.in_features));
  forward->x.data = backward->x.data = allocate(p.rows * p.in_features, p.dtype, 1.0f);
  if (!options.base) {
    forward->weight.data = backward->weight.data =
        allocate(p.out_features * p.in_features, p.dtype, in);
  }
  forward->lora_a.data = backward->lora_a.data =
      allocate(p.rank * p.in_features, p.adapter_dtype, in);
  forward->lora_b.data = backward->lora_b.data =
      allocate(p.out_features * p.rank, p.adapter_dtype, 0.1f);
  if (options.bias && !options.base) forward->bias = allocate(p.out_features, p.dtype, 1.0f);
  backward->dy.data = allocate(p.rows * p.out_features, p.dtype, 1.0f);
  forward->y = allocate(p.rows * p.out_features, p.dtype, 0.0f);
  if (options.base) {
    forward->base = forward->y;
    forward->base_stride = p.out_features;
  }
  forward->h = allocate(p.rows * p.rank, kernels::rank_dtype(p), 0.0f);
  backward->h = forward->h;
  backward->dx = allocate(p.rows * p.in_features, p.dtype, 0.0f);
  backward->dlora_a = allocate(p.rank * p.in_features, p.adapter_dtype, 0.0f);
  backward->dlora_b = allocate(p.out_features * p.rank, p.adapter_dtype, 0.0f);
  if (forward->dropout.active()) forward->dropout.seed = backward->dropout.seed = seed();
}

}  // namespace

void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + call + ": " +
                           cudaGetErrorString(error));
}

void fill(void* data, DType dtype, int64_t count, float scale, uint64_t seed) {
  if (count == 0) return;
  fill_uniform<<<1024, 256>>>(data, dtype, count, scale, seed);
  FUSED_LORA_CHECK(cudaGetLastError());
}

Operands::Operands(const Options& options) {
  place(
      options, &forward, &backward,
      [this](int64_t count, DType dtype, float scale) { return random(count, dtype, scale); },
      [this] {
        const int64_t seed = 20260319;
        void* placed = allocate(sizeof seed);
        FUSED_LORA_CHECK(cudaMemcpy(placed, &seed, sizeof seed, cudaMemcpyHostToDevice));
        return static_cast<const int64_t*>(placed);
      });
  FUSED_LORA_CHECK(cudaDeviceSynchronize());
}

void* Operands::allocate(int64_t bytes) {
  void* pointer = nullptr;
  FUSED_LORA_CHECK(cudaMalloc(&pointer, static_cast<size_t>(bytes)));
  owned_.emplace_back(pointer);
  return pointer;
}

void* Operands::random(int64_t count, DType dtype, float scale) {
  void* data = allocate(count * kernels::bytes_of(dtype));
  fill(data, dtype, count, scale, owned_.size());
  return data;
}

void describe_calls(const Options& options, ForwardCall* forward, BackwardCall* backward) {
  // A plan looks at a pointer's alignment alone; cudaMalloc's are multiples of 256.
  uintptr_t next = 256;
  const auto address = [&next] { return reinterpret_cast<void*>(next += 256); };
  place(
      options, forward, backward, [&](int64_t, DType, float) { return address(); },
      [&] { return static_cast<const int64_t*>(address()); });
}

}  // namespace fused_lora::profile
