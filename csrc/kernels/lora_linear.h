// The fused LoRA linear on CUDA: what to compute, the plan for it, and the launch.
//
//     y  = x Wᵀ + b + h Bᵀ            x: M×K   W: N×K   A: r×K   B: N×r   y: M×N
//     h  = s · drop(x) Aᵀ             h: M×r   (kept for backward)
//     g  = s · dy B                   g: M×r
//     dx = dy W + drop'(g A)          dA = gᵀ drop(x)   dB = dyᵀ h
//
// The frozen product may be another's work, that of a quantised layer say: then its result takes
// the place of x Wᵀ + b, and dx is without dy W, which that layer's own backward gives.
//
// Rows may have adapters of their own (common/row_adapter.h): then h and g are zero outside of a
// row's ranks, and what one adapter or its rows hold, infinities included, reaches neither
// another's rows nor its gradients.
//
// Torch-free. A call describes operands by raw pointers and int64 strides; a plan is a pure host
// function of the call and of the device's figures; a run launches the plan's kernels on a stream,
// without synchronisation and without an allocation, so it can be captured into a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/dropout.h"
#include "common/row_adapter.h"

namespace fused_lora::kernels {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Element (i, j) lies at data + i * row_stride + j * column_stride, in elements.
struct MatrixView {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;

  MatrixView transposed() const { return {data, column_stride, row_stride}; }
};

// Dropout of x by the rule of common/dropout.h. keep = 65536 keeps everything and reads no seed.
struct Dropout {
  const int64_t* seed = nullptr;  // in device memory
  uint32_t keep = 65536;          // of 65536
  float scale = 1.0f;             // 65536 / keep; 0 where nothing is kept
  int64_t first_block = 0;        // in the mask, of x's columns: they begin at 8 · first_block

  FUSED_LORA_HOST_DEVICE bool active() const { return keep < 65536; }
};

struct Problem {
  int64_t rows = 0;               // M: rows of x, dy, y and dx
  int64_t in_features = 0;        // K
  int64_t out_features = 0;       // N
  int64_t rank = 0;               // r
  DType dtype = DType::kFloat32;  // of x, W, b, y and dy, dx
  DType adapter_dtype =
      DType::kFloat32;          // of A and B: dtype, or fp32 masters beside a 16-bit dtype
  bool round_adapters = false;  // masters are rounded to dtype first, as autocast does
  bool allow_tf32 = false;      // fp32 products may go through tf32 matrix units
};

// How products are formed. Sums are in fp32 always.
enum class Arithmetic : int32_t {
  kHalf,         // 16-bit operands, adapters in the same dtype or rounded to it
  kHalfMasters,  // 16-bit operands, the low-rank path in the precision of its fp32 masters
  kTf32,         // fp32 operands, rounded to tf32
  kFloat32,      // fp32 operands, fp32 products
};

inline Arithmetic arithmetic_of(const Problem& p) {
  if (p.dtype == DType::kFloat32) return p.allow_tf32 ? Arithmetic::kTf32 : Arithmetic::kFloat32;
  const bool masters = p.adapter_dtype == DType::kFloat32 && !p.round_adapters;
  return masters ? Arithmetic::kHalfMasters : Arithmetic::kHalf;
}

// The dtype of h and g.
inline DType rank_dtype(const Problem& p) {
  return arithmetic_of(p) == Arithmetic::kHalf ? p.dtype : DType::kFloat32;
}

struct ForwardCall {
  Problem problem;
  MatrixView x;                // M×K
  MatrixView weight;           // N×K, in either storage order (Conv1D's is transposed)
  MatrixView lora_a;           // r×K
  MatrixView lora_b;           // N×r
  const void* bias = nullptr;  // N, or none
  double scaling = 1.0;
  Dropout dropout;
  // M of them, in device memory; null: every row uses all ranks with the call's scaling.
  const RowAdapter* row_adapters = nullptr;
  // M×N, in dtype, its rows base_stride elements apart: what the frozen layer gave. Then y = base +
  // h Bᵀ, and weight and bias are not read.
  const void* base = nullptr;
  int64_t base_stride = 0;
  void* y = nullptr;     // M×N, dense; or base itself
  void* h = nullptr;     // M×r, in rank_dtype
  int64_t h_stride = 0;  // of h's rows; 0: they lie dense
};

// dx, dlora_a and dlora_b may each be null: then it is not computed, and neither is what only it
// needs. x is read for dlora_a alone, h for dlora_b alone, weight for dx alone: where it is null,
// dx = drop'(g A).
struct BackwardCall {
  Problem problem;
  MatrixView dy;            // M×N
  MatrixView x;             // M×K
  MatrixView weight;        // N×K
  MatrixView lora_a;        // r×K
  MatrixView lora_b;        // N×r
  const void* h = nullptr;  // M×r, in rank_dtype
  int64_t h_stride = 0;     // of h's rows; 0: they lie dense
  double scaling = 1.0;
  Dropout dropout;
  // M of them, in device memory; null: every row uses all ranks with the call's scaling.
  const RowAdapter* row_adapters = nullptr;
  bool adds_to_dx = false;  // dx holds a gradient already, and this call's is added to it
  void* dx = nullptr;       // M×K, dense, in dtype
  void* dlora_a = nullptr;  // r×K, dense, in adapter_dtype
  void* dlora_b = nullptr;  // N×r, dense, in adapter_dtype
};

// The figures of a device that a plan depends on.
struct Device {
  int compute_capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int shared_memory_per_block = 163 * 1024;  // opt-in limit, bytes
};

// Reads the current device's figures. They do not change: callers keep them. The error of a device
// that these kernels were not compiled for is cudaErrorNoKernelImageForDevice.
cudaError_t current_device(Device* device);

// Which kernels a call takes: a pure function of the call and the device. Pointers are looked at
// for their alignment alone, so a plan holds for any operands of the same shapes, strides and
// alignment.
struct ForwardPlan;
struct BackwardPlan;
ForwardPlan plan(const ForwardCall& call, const Device& device);
BackwardPlan plan(const BackwardCall& call, const Device& device);

// Calls of one x, projections that share their input, which is read once for all their h by one
// launch, and once for all their dA; up to kMostCalls of stages.h at a time. In a backward the
// calls' dx, where not null, are one: the first is written, and each later call's is added to what
// is there.
template <typename Plan>
struct GroupPlan;
GroupPlan<ForwardPlan> plan(const ForwardCall* calls, int count, const Device& device);
GroupPlan<BackwardPlan> plan(const BackwardCall* calls, int count, const Device& device);

// Whether a plan is presumed faster than torch's GEMMs, which decides where nothing was timed: a
// tensor-core kernel serves every stage, and mma.sync is all that the device's tensor cores have,
// or the rows are so few that reading W bounds the call.
bool presumed_faster(const ForwardPlan& plan);
bool presumed_faster(const BackwardPlan& plan);

// The kernels of a plan, in the order of their launches, and where a plain kernel serves, why.
std::string describe(const ForwardPlan& plan);
std::string describe(const BackwardPlan& plan);

// Launches a plan on a stream of the current device. workspace: plan.workspace_bytes of device
// memory, aligned to 256, its contents arbitrary; null where that is 0. Returns the first launch's
// error.
cudaError_t run(const ForwardCall& call, const ForwardPlan& plan, void* workspace,
                cudaStream_t stream);
cudaError_t run(const BackwardCall& call, const BackwardPlan& plan, void* workspace,
                cudaStream_t stream);
cudaError_t run(const ForwardCall* calls, const GroupPlan<ForwardPlan>& plan, void* workspace,
                cudaStream_t stream);
cudaError_t run(const BackwardCall* calls, const GroupPlan<BackwardPlan>& plan, void* workspace,
                cudaStream_t stream);

// The keep-mask of rows row_offset .. row_offset+rows-1 and columns column_offset ..
// column_offset+columns-1, as 0 and 1. out: rows×columns, dense.
enum class MaskDType : int32_t { kBool, kFloat32, kFloat64, kBFloat16, kFloat16 };
struct MaskCall {
  const int64_t* seed = nullptr;  // in device memory
  uint32_t keep = 65536;
  int64_t rows = 0, columns = 0;
  int64_t row_offset = 0, column_offset = 0;
  MaskDType dtype = MaskDType::kBool;
  void* out = nullptr;
};
cudaError_t run(const MaskCall& call, cudaStream_t stream);

}  // namespace fused_lora::kernels
