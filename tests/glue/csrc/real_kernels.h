// The kernels' entry points under names of their own: the build of the tests has others in their
// place.
#pragma once

#include "kernels/plan.h"
#include "kernels/row_adapters.h"

extern "C" {
cudaError_t real_forward(const fused_lora::kernels::ForwardCall& call,
                         const fused_lora::kernels::ForwardPlan& plan, void* workspace,
                         cudaStream_t stream);
cudaError_t real_backward(const fused_lora::kernels::BackwardCall& call,
                          const fused_lora::kernels::BackwardPlan& plan, void* workspace,
                          cudaStream_t stream);
cudaError_t real_forward_group(
    const fused_lora::kernels::ForwardCall* calls,
    const fused_lora::kernels::GroupPlan<fused_lora::kernels::ForwardPlan>& plan, void* workspace,
    cudaStream_t stream);
cudaError_t real_backward_group(
    const fused_lora::kernels::BackwardCall* calls,
    const fused_lora::kernels::GroupPlan<fused_lora::kernels::BackwardPlan>& plan, void* workspace,
    cudaStream_t stream);
cudaError_t real_mask(const fused_lora::kernels::MaskCall& call, cudaStream_t stream);
cudaError_t real_row_adapters(const fused_lora::kernels::RowAdaptersCall& call,
                              cudaStream_t stream);
}
