// Weights into panels and back (torch/packed_weight.h).
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_lora::cpu {

// weight: out_features×in_features of any strides. Throws where it cannot be packed.
at::Tensor pack_weight(const at::Tensor& weight);
// Dense by rows.
at::Tensor unpack_weight(const at::Tensor& packed);

// A module's weight, which its Parameter holds plain or not at all.

// Of `parameter`, whose data is the weight or, `transposed`, in_features×out_features. A tensor in
// its own right even in inference mode, under a transform or while something is traced.
at::Tensor pack_parameter(const at::Tensor& parameter, bool transposed);

// Lets `parameter` hold no data.
void empty(const at::Tensor& parameter);

// Gives `parameter` its data again, from `packed`, with the strides it had.
void restore(const at::Tensor& parameter, const at::Tensor& packed, at::IntArrayRef strides,
             bool transposed);

}  // namespace fused_lora::cpu
