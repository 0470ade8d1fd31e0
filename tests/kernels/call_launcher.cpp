// A C interface to csrc/kernels/lora_linear.h for call.py.
#include <cstdio>

#include "kernels/plan.h"

namespace k = fused_lora::kernels;

namespace {

struct Facts {
  size_t workspace_bytes;
  int launches;
  char description[1024];
};

template <typename Plan>
void tell(const Plan& plan, Facts* facts) {
  facts->workspace_bytes = plan.workspace_bytes;
  facts->launches = plan.launches;
  std::snprintf(facts->description, sizeof(facts->description), "%s", k::describe(plan).c_str());
}

}  // namespace

extern "C" {

size_t ForwardCall_bytes() {
  return sizeof(k::ForwardCall);
}
size_t BackwardCall_bytes() {
  return sizeof(k::BackwardCall);
}
size_t Device_bytes() {
  return sizeof(k::Device);
}
size_t Facts_bytes() {
  return sizeof(Facts);
}

int device(k::Device* device) {
  return k::current_device(device);
}

void forward_plan(const k::ForwardCall* call, const k::Device* device, Facts* facts) {
  tell(k::plan(*call, *device), facts);
}
int forward_run(const k::ForwardCall* call, const k::Device* device, void* workspace,
                cudaStream_t stream) {
  return k::run(*call, k::plan(*call, *device), workspace, stream);
}

void backward_plan(const k::BackwardCall* call, const k::Device* device, Facts* facts) {
  tell(k::plan(*call, *device), facts);
}
int backward_run(const k::BackwardCall* call, const k::Device* device, void* workspace,
                 cudaStream_t stream) {
  return k::run(*call, k::plan(*call, *device), workspace, stream);
}

void forward_group_plan(const k::ForwardCall* calls, int count, const k::Device* device,
                        Facts* facts) {
  tell(k::plan(calls, count, *device), facts);
}
int forward_group_run(const k::ForwardCall* calls, int count, const k::Device* device,
                      void* workspace, cudaStream_t stream) {
  return k::run(calls, k::plan(calls, count, *device), workspace, stream);
}

void backward_group_plan(const k::BackwardCall* calls, int count, const k::Device* device,
                         Facts* facts) {
  tell(k::plan(calls, count, *device), facts);
}
int backward_group_run(const k::BackwardCall* calls, int count, const k::Device* device,
                       void* workspace, cudaStream_t stream) {
  return k::run(calls, k::plan(calls, count, *device), workspace, stream);
}

}  // extern "C"
