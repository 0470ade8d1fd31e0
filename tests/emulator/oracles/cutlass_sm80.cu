// CUTLASS 2.x tensor-core GEMMs for sm_80, through CUTLASS's own host API.
//
// The two letters in a launcher's name are the layouts of A and B as BLAS transposes column-major
// operands: "tn" is A row-major and B column-major (k is contiguous in both), "nt" is A
// column-major and B row-major (k is contiguous in neither), "nn" is both column-major. The
// alignment is 8 elements unless the name says otherwise. Launchers return cutlass::Status, 0 for
// success.
#include <cutlass/gemm/device/gemm.h>
#include <cutlass/gemm/device/gemm_splitk_parallel.h>

#include "gemm_call.h"

namespace {

using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using cutlass::bfloat16_t;
using cutlass::half_t;
using cutlass::gemm::GemmShape;

using TensorCore = cutlass::arch::OpClassTensorOp;
using Ampere = cutlass::arch::Sm80;
using Mma = GemmShape<16, 8, 16>;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>;

template <typename Output, int kAlignment>
using Epilogue = cutlass::epilogue::thread::LinearCombination<Output, kAlignment, float, float>;

template <typename Input, typename LayoutA, typename LayoutB, typename Output, typename Tile,
          typename WarpTile, int kStages, int kAlignment, bool kSplitKSerial = false>
using Gemm =
    cutlass::gemm::device::Gemm<Input, LayoutA, Input, LayoutB, Output, Row, float, TensorCore,
                                Ampere, Tile, WarpTile, Mma, Epilogue<Output, kAlignment>, Swizzle,
                                kStages, kAlignment, kAlignment, kSplitKSerial>;

using Bf16Tn =
    Gemm<bfloat16_t, Row, Column, bfloat16_t, GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 3, 8>;
using F16Nn =
    Gemm<half_t, Column, Column, half_t, GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, 4, 8>;
using Bf16Nt =
    Gemm<bfloat16_t, Column, Row, float, GemmShape<64, 128, 32>, GemmShape<32, 64, 32>, 3, 8>;
// cp.async copies no less than 4 bytes: two elements. With an alignment of one, CUTLASS's main loop
// has two stages and goes through registers.
using Bf16TnAlign2 =
    Gemm<bfloat16_t, Row, Column, bfloat16_t, GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, 3, 2>;
using F16TnAlign1 =
    Gemm<half_t, Row, Column, half_t, GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, 2, 1>;
using F16TnSerial =
    Gemm<half_t, Row, Column, half_t, GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, 3, 8, true>;
using Bf16TnParallel =
    cutlass::gemm::device::GemmSplitKParallel<bfloat16_t, Row, bfloat16_t, Column, bfloat16_t, Row,
                                              float, TensorCore, Ampere, GemmShape<64, 64, 32>,
                                              GemmShape<32, 32, 32>, Mma, Epilogue<bfloat16_t, 8>>;

template <typename Gemm>
typename Gemm::Arguments arguments(const GemmCall& call) {
  return {{call.m, call.n, call.k},
          {static_cast<const typename Gemm::ElementA*>(call.a), call.lda},
          {static_cast<const typename Gemm::ElementB*>(call.b), call.ldb},
          {static_cast<const typename Gemm::ElementC*>(call.c), call.ldc},
          {static_cast<typename Gemm::ElementC*>(call.d), call.ldd},
          {call.alpha, call.beta},
          call.slices};
}

template <typename Gemm>
int launch(const GemmCall& call) {
  const auto args = arguments<Gemm>(call);
  const cutlass::Status status = Gemm::can_implement(args);
  if (status != cutlass::Status::kSuccess) return static_cast<int>(status);
  Gemm gemm;
  return static_cast<int>(gemm(args, call.workspace, call.stream));
}

}  // namespace

extern "C" {
int cutlass_sm80_bf16_tn(const GemmCall* call) {
  return launch<Bf16Tn>(*call);
}
int cutlass_sm80_f16_nn(const GemmCall* call) {
  return launch<F16Nn>(*call);
}
int cutlass_sm80_bf16_nt(const GemmCall* call) {
  return launch<Bf16Nt>(*call);
}
int cutlass_sm80_bf16_tn_align2(const GemmCall* call) {
  return launch<Bf16TnAlign2>(*call);
}
int cutlass_sm80_f16_tn_align1(const GemmCall* call) {
  return launch<F16TnAlign1>(*call);
}
int cutlass_sm80_f16_tn_serial(const GemmCall* call) {
  return launch<F16TnSerial>(*call);
}
int cutlass_sm80_bf16_tn_parallel(const GemmCall* call) {
  return launch<Bf16TnParallel>(*call);
}

size_t cutlass_sm80_f16_tn_serial_workspace(const GemmCall* call) {
  return F16TnSerial::get_workspace_size(arguments<F16TnSerial>(*call));
}
size_t cutlass_sm80_bf16_tn_parallel_workspace(const GemmCall* call) {
  return Bf16TnParallel::get_workspace_size(arguments<Bf16TnParallel>(*call));
}
}
