// CUTLASS 3.x warp-specialised GEMMs for sm_90a (TMA, mbarrier, wgmma), through CUTLASS's own host
// API.
//
// Names and results are those of cutlass_sm80.cu. The alignment is 8 elements, TMA's 16 bytes.
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "gemm_call.h"

namespace {

using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using cutlass::bfloat16_t;

using TensorCore = cutlass::arch::OpClassTensorOp;
using Hopper = cutlass::arch::Sm90;
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
constexpr int kAlignment = 8;

template <typename LayoutA, typename LayoutB, typename Tile, typename MainloopSchedule,
          typename EpilogueSchedule>
struct Kernel {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Hopper, TensorCore, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, bfloat16_t, Row, kAlignment, bfloat16_t, Row, kAlignment,
      EpilogueSchedule>::CollectiveOp;
  // As many stages as fit into the shared memory beside the epilogue's tile.
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Hopper, TensorCore, bfloat16_t, LayoutA, kAlignment, bfloat16_t, LayoutB, kAlignment, float,
      Tile, Cluster, Stages, MainloopSchedule>::CollectiveOp;
  using Shape = cute::Shape<int, int, int, int>;  // m, n, k and the number of matrices
  using type = cutlass::gemm::kernel::GemmUniversal<Shape, Mainloop, Epilogue>;
};

template <typename... Configuration>
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<typename Kernel<Configuration...>::type>;

using Tile64 = cute::Shape<cute::_64, cute::_64, cute::_64>;

using Bf16Tn = Gemm<Row, Column, Tile64, cutlass::gemm::KernelTmaWarpSpecialized,
                    cutlass::epilogue::TmaWarpSpecialized>;
using Bf16NtPingpong = Gemm<Column, Row, Tile64, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                            cutlass::epilogue::NoSmemWarpSpecialized>;

// CuTe's strides of a single matrix: the contiguous one is static, the other is the leading
// dimension.
template <typename Stride>
Stride stride(int leading_dimension) {
  Stride result{};
  if constexpr (cute::is_static_v<cute::remove_cvref_t<decltype(cute::get<1>(result))>>) {
    cute::get<0>(result) = leading_dimension;
  } else {
    cute::get<1>(result) = leading_dimension;
  }
  return result;
}

template <typename Gemm>
typename Gemm::Arguments arguments(const GemmCall& call) {
  using Kernel = typename Gemm::GemmKernel;
  return {cutlass::gemm::GemmUniversalMode::kGemm,
          {call.m, call.n, call.k, 1},
          {static_cast<const bfloat16_t*>(call.a), stride<typename Kernel::StrideA>(call.lda),
           static_cast<const bfloat16_t*>(call.b), stride<typename Kernel::StrideB>(call.ldb)},
          {{call.alpha, call.beta},
           static_cast<const bfloat16_t*>(call.c),
           stride<typename Kernel::StrideC>(call.ldc),
           static_cast<bfloat16_t*>(call.d),
           stride<typename Kernel::StrideD>(call.ldd)},
          cutlass::KernelHardwareInfo::make_kernel_hardware_info<Kernel>()};
}

template <typename Gemm>
int launch(const GemmCall& call) {
  const auto args = arguments<Gemm>(call);
  const cutlass::Status status = Gemm::can_implement(args);
  if (status != cutlass::Status::kSuccess) return static_cast<int>(status);
  Gemm gemm;
  return static_cast<int>(gemm(args, /*workspace=*/nullptr, call.stream));
}

}  // namespace

extern "C" {
int cutlass_sm90_bf16_tn(const GemmCall* call) {
  return launch<Bf16Tn>(*call);
}
int cutlass_sm90_bf16_nt_pingpong(const GemmCall* call) {
  return launch<Bf16NtPingpong>(*call);
}
}
