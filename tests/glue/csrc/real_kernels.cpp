#include "real_kernels.h"

using namespace fused_lora::kernels;

cudaError_t real_forward(const ForwardCall& call, const ForwardPlan& plan, void* workspace,
                         cudaStream_t stream) {
  return run(call, plan, workspace, stream);
}

cudaError_t real_backward(const BackwardCall& call, const BackwardPlan& plan, void* workspace,
                          cudaStream_t stream) {
  return run(call, plan, workspace, stream);
}

cudaError_t real_forward_group(const ForwardCall* calls, const GroupPlan<ForwardPlan>& plan,
                               void* workspace, cudaStream_t stream) {
  return run(calls, plan, workspace, stream);
}

cudaError_t real_backward_group(const BackwardCall* calls, const GroupPlan<BackwardPlan>& plan,
                                void* workspace, cudaStream_t stream) {
  return run(calls, plan, workspace, stream);
}

cudaError_t real_mask(const MaskCall& call, cudaStream_t stream) {
  return run(call, stream);
}

cudaError_t real_row_adapters(const RowAdaptersCall& call, cudaStream_t stream) {
  return run(call, stream);
}
