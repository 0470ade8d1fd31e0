// out[i] = Σ_s partials[s · count + i], in the order of s, for every output of one launch.
//
// partials: splits × count, fp32. A thread adds four neighbours, 16 bytes a load, where count and
// the addresses allow it; blocks are small, so that the few numbers of a skinny output spread over
// the multiprocessors, and eight loads are under way at a time. No shared memory.
#include <algorithm>

#include "kernels/element.h"
#include "kernels/rank_grad/rank_grad.h"

namespace fused_lora::kernels {

namespace {

constexpr int kReduceThreads = 128;

struct Output {
  const float* partials;
  int splits;
  int64_t count;
  void* out;
  DType out_dtype;
  bool by_four;
  int64_t first_block;
};

struct Outputs {
  Output each[kMostGrads];
  int used;
};

__device__ __forceinline__ void add(float& sum, float value) {
  sum += value;
}
__device__ __forceinline__ void add(float4& sum, const float4& value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
}

// Vector: float or float4; index counts them.
template <typename Vector>
__device__ __forceinline__ Vector sum_of(const Output& output, int64_t index) {
  const int64_t stride = output.count / static_cast<int64_t>(sizeof(Vector) / sizeof(float));
  const Vector* from = reinterpret_cast<const Vector*>(output.partials) + index;
  Vector sum = {};
#pragma unroll 8
  for (int s = 0; s < output.splits; ++s) add(sum, from[s * stride]);
  return sum;
}

template <typename T>
__device__ __forceinline__ void store_pairs(void* out, int64_t index, const float4& sum) {
  static_cast<uint2*>(out)[index] = {pack_pair<T>(sum.x, sum.y), pack_pair<T>(sum.z, sum.w)};
}

__device__ __forceinline__ void reduce_four(const Output& output, int64_t index) {
  if (index >= output.count / 4) return;
  const float4 sum = sum_of<float4>(output, index);
  if (output.out_dtype == DType::kFloat32) {
    static_cast<float4*>(output.out)[index] = sum;
  } else if (output.out_dtype == DType::kBFloat16) {
    store_pairs<bf16>(output.out, index, sum);
  } else {
    store_pairs<fp16>(output.out, index, sum);
  }
}

__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials(const __grid_constant__ Outputs outputs) {
  const int64_t block = blockIdx.x;
  int own = 0;
#pragma unroll
  for (int i = 1; i < kMostGrads; ++i) {
    if (i < outputs.used && block >= outputs.each[i].first_block) own = i;
  }
  const Output& output = outputs.each[own];
  const int64_t index =
      (block - output.first_block) * kReduceThreads + static_cast<int>(threadIdx.x);
  if (output.by_four) {
    reduce_four(output, index);
  } else if (index < output.count) {
    store_from_float(output.out, output.out_dtype, index, sum_of<float>(output, index));
  }
}

bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace

cudaError_t launch_reduce_partials(const Partials* given, int count, cudaStream_t stream) {
  Outputs outputs{};
  outputs.used = count;
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    const Partials& from = given[i];
    const bool by_four = from.count % 4 == 0 && aligned(from.partials, 16) &&
                         aligned(from.out, 4 * bytes_of(from.out_dtype));
    const int64_t threads = by_four ? from.count / 4 : from.count;
    outputs.each[i] = {from.partials,  from.splits, from.count, from.out,
                       from.out_dtype, by_four,     blocks};
    blocks += (threads + kReduceThreads - 1) / kReduceThreads;
  }
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  reduce_partials<<<static_cast<unsigned>(blocks), kReduceThreads, 0, stream>>>(outputs);
  return cudaGetLastError();
}

}  // namespace fused_lora::kernels
