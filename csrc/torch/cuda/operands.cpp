#include "torch/cuda/operands.h"

#include <ATen/Context.h>

#include <type_traits>

namespace fused_lora::cuda {
namespace {

// torch has an older switch (allow_tf32, set_float32_matmul_precision) and a newer one
// (fp32_precision), which follows the older. The newer is asked for with strings at first and with
// enumerations since; before it there was the older alone, which refuses to answer where both are
// used.
template <typename Context, typename Precision, typename Backend, typename Operation>
bool is_tf32(const Context& context, Precision (Context::*precision)(Backend, Operation) const) {
  if constexpr (std::is_enum_v<Backend>) {
    return (context.*precision)(Backend::CUDA, Operation::MATMUL) == Precision::TF32;
  } else {
    return (context.*precision)("cuda", "matmul") == "tf32";
  }
}

template <typename Context>
auto tf32_of(const Context& context, int)
    -> decltype(is_tf32(context, &Context::float32Precision)) {
  return is_tf32(context, &Context::float32Precision);
}

template <typename Context>
bool tf32_of(const Context& context, long) {
  return context.allowTF32CuBLAS();
}

}  // namespace

bool allows_tf32() {
  return tf32_of(at::globalContext(), 0);
}

bool has_kernels(at::ScalarType dtype) {
  return dtype != at::kDouble;
}

kernels::DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kernels::DType::kFloat32;
    case at::kBFloat16:
      return kernels::DType::kBFloat16;
    default:
      TORCH_INTERNAL_ASSERT(dtype == at::kHalf);
      return kernels::DType::kFloat16;
  }
}

at::ScalarType torch_dtype(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::kFloat32:
      return at::kFloat;
    case kernels::DType::kBFloat16:
      return at::kBFloat16;
    default:
      return at::kHalf;
  }
}

kernels::MatrixView view(const at::Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  // A dimension of one element has no stride, and what the tensor says of it is arbitrary: it gets
  // one that suits the loads of 16-byte chunks.
  constexpr int64_t kChunk = 16;
  const int64_t column_stride = columns > 1 ? matrix.stride(1) : 1;
  const int64_t dense = column_stride == 1 ? (columns + kChunk - 1) / kChunk * kChunk : 1;
  return {matrix.const_data_ptr(), rows > 1 ? matrix.stride(0) : dense, column_stride};
}

kernels::Problem problem(const at::Tensor& rows, int64_t out_features, int64_t in_features,
                         const at::Tensor& lora_a, bool round_adapters) {
  kernels::Problem p;
  p.rows = rows.size(0);
  p.in_features = in_features;
  p.out_features = out_features;
  p.rank = lora_a.size(0);
  p.dtype = kernel_dtype(rows.scalar_type());
  p.adapter_dtype = kernel_dtype(lora_a.scalar_type());
  p.round_adapters = round_adapters && p.dtype != p.adapter_dtype;
  p.allow_tf32 = p.dtype == kernels::DType::kFloat32 && allows_tf32();
  return p;
}

kernels::Dropout dropout(const composed::Dropout& dropout) {
  if (!dropout.active()) return {};
  const DropoutRule rule = DropoutRule::from_probability(dropout.p);
  return {dropout.seed->const_data_ptr<int64_t>(), rule.keep, static_cast<float>(rule.scale),
          dropout.column_offset / kLanes};
}

}  // namespace fused_lora::cuda
