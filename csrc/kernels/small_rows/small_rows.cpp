#include "kernels/small_rows/small_rows.h"

#include "kernels/alignment.h"
#include "kernels/plan.h"
#include "kernels/small_rows/params.h"
#include "kernels/stages.h"

namespace fused_lora::kernels {

const char* small_rows_obstacle(const ForwardCall& call) {
  const Problem& p = call.problem;
  // A CTA's part of W is 64 columns of 16 bits for each step of the depth.
  constexpr int64_t kWeightBytes = 64 * 2;
  if (call.base != nullptr || p.in_features == 0) return "there is no weight to read";
  if (p.rows > kSmallRows) return "there are more than 64 rows";
  if (bytes_of(p.dtype) != 2) return "x is fp32";
  if (call.dropout.active()) return "each block would draw the whole dropout mask";
  if (p.rank * bytes_of(p.adapter_dtype) > kWeightBytes) {
    return "A is larger than a block's part of the weight";
  }
  if (row_obstacle(call.lora_a, p.rank, p.in_features, bytes_of(p.adapter_dtype), kOfX) !=
      nullptr) {
    return "A's rows are not chunks of 16 bytes";
  }
  return nullptr;
}

cudaError_t launch_small_rows(const ForwardCall& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  const bool depth_contiguous = call.weight.column_stride == 1;
  const int64_t bytes = bytes_of(p.dtype);
  small_rows::Params params = {};
  params.x = call.x.data;
  params.x_pitch = call.x.row_stride * bytes;
  params.weight = call.weight.data;
  params.weight_pitch =
      (depth_contiguous ? call.weight.row_stride : call.weight.column_stride) * bytes;
  params.lora_a = call.lora_a.data;
  params.lora_a_stride = call.lora_a.row_stride;
  params.lora_b = call.lora_b;
  params.bias = call.bias;
  params.y = call.y;
  params.h = call.h;
  params.h_stride = stride_or_dense(call.h_stride, p.rank);
  params.rows = static_cast<int>(p.rows);
  params.columns = static_cast<int>(p.out_features);
  params.depth = static_cast<int>(p.in_features);
  params.rank = static_cast<int>(p.rank);
  params.scaling = static_cast<float>(common_scaling(call));
  params.row_adapters = call.row_adapters;
  const int ranks = p.rank <= 16 ? 16 : p.rank <= 32 ? 32 : 64;
  const auto launch =
      p.dtype == DType::kBFloat16 ? small_rows::launch_bf16 : small_rows::launch_fp16;
  return launch(params, arithmetic_of(p), p.adapter_dtype, depth_contiguous, ranks, stream);
}

}  // namespace fused_lora::kernels
