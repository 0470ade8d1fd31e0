#include "torch/cuda/mask.h"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "common/dropout.h"
#include "kernels/lora_linear.h"
#include "torch/cuda/device.h"
#include "torch/cuda/stream.h"

namespace fused_lora::cuda {
namespace {

kernels::MaskDType mask_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBool:
      return kernels::MaskDType::kBool;
    case at::kFloat:
      return kernels::MaskDType::kFloat32;
    case at::kDouble:
      return kernels::MaskDType::kFloat64;
    case at::kBFloat16:
      return kernels::MaskDType::kBFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kHalf, "dropout_mask: not implemented for torch.",
                                  c10::getDtypeNames(dtype).first);
      return kernels::MaskDType::kFloat16;
  }
}

}  // namespace

at::Tensor dropout_mask(const at::Tensor& seed, int64_t rows, int64_t columns, double p,
                        int64_t row_offset, int64_t column_offset, at::ScalarType dtype) {
  kernels::MaskCall call;
  call.seed = seed.const_data_ptr<int64_t>();
  call.keep = DropoutRule::from_probability(p).keep;
  call.rows = rows;
  call.columns = columns;
  call.row_offset = row_offset;
  call.column_offset = column_offset;
  call.dtype = mask_dtype(dtype);
  at::Tensor mask = at::empty({rows, columns}, seed.options().dtype(dtype));
  call.out = mask.mutable_data_ptr();
  check(kernels::run(call, current_stream(seed.device())), "the dropout mask's launch");
  return mask;
}

}  // namespace fused_lora::cuda
