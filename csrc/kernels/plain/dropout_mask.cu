// The keep-mask of dropout as numbers 0 and 1.        out: rows×columns, dense
//
// A thread draws one Philox block, eight columns of a row. Where blocks fill the rows and out is
// aligned, out is one run of blocks: a warp draws 32 of them, its lanes exchange their bits, and
// each store of 16 bytes a lane (8 for bool) is contiguous across the warp. Elsewhere a thread
// writes the columns of its block that out has, one by one.
#include "kernels/element.h"
#include "kernels/lora_linear.h"
#include "kernels/tile/dropout.cuh"

namespace fused_lora::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpLanes = 32;

// One of an element type of BYTES bytes; its zero is all zeros.
template <int BYTES, uint64_t ONE>
struct Element {
  static constexpr int kBytes = BYTES;
  static constexpr uint64_t kOne = ONE;
};
using Bool = Element<1, 1>;
using Float32 = Element<4, 0x3f800000>;
using Float64 = Element<8, 0x3ff0000000000000>;
using BFloat16 = Element<2, 0x3f80>;
using Float16 = Element<2, 0x3c00>;

template <typename E>
constexpr int kVectorBytes = kLanes * E::kBytes < 16 ? kLanes * E::kBytes : 16;

// The elements of one vector, kept where bits say so, as 32-bit words.
template <typename E>
__device__ __forceinline__ void store_vector(void* out, uint32_t bits) {
  constexpr int kBytes = kVectorBytes<E>;
  uint32_t words[kBytes / 4] = {};
#pragma unroll
  for (int i = 0; i < kBytes / E::kBytes; ++i) {
    const bool kept = (bits >> i) & 1;
    if constexpr (E::kBytes == 8) {
      words[2 * i + 1] = kept ? static_cast<uint32_t>(E::kOne >> 32) : 0;
    } else {
      const int byte = i * E::kBytes;
      words[byte / 4] |= kept ? static_cast<uint32_t>(E::kOne) << (byte % 4 * 8) : 0;
    }
  }
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(out) = {words[0], words[1], words[2], words[3]};
  } else {
    *static_cast<uint2*>(out) = {words[0], words[1]};
  }
}

template <typename E>
__device__ __forceinline__ void store_element(void* out, bool kept) {
  if constexpr (E::kBytes == 1) {
    *static_cast<uint8_t*>(out) = kept;
  } else if constexpr (E::kBytes == 2) {
    *static_cast<uint16_t*>(out) = kept ? static_cast<uint16_t>(E::kOne) : 0;
  } else if constexpr (E::kBytes == 4) {
    *static_cast<uint32_t*>(out) = kept ? static_cast<uint32_t>(E::kOne) : 0;
  } else {
    *static_cast<uint64_t*>(out) = kept ? E::kOne : 0;
  }
}

template <typename E>
__global__ void __launch_bounds__(kThreads)
    dropout_mask_kernel(const MaskCall call, int64_t row_blocks, bool vectors) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / row_blocks;
  const int64_t block = call.column_offset / kLanes + index % row_blocks;
  const Philox4x32 words = dropout_words(*call.seed, call.row_offset + row, block);
  uint32_t bits = 0;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    bits |= (dropout_lane(words, lane) < call.keep ? 1u : 0u) << lane;
  }
  auto* out = static_cast<uint8_t*>(call.out);
  if (vectors) {
    constexpr int kElements = kVectorBytes<E> / E::kBytes;
    constexpr int kVectors = kLanes / kElements;  // of a block
    const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
    const int64_t first = (index - lane) * kVectors, count = call.rows * row_blocks * kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = i * kWarpLanes + lane;
      const uint32_t of_block = __shfl_sync(0xffffffffu, bits, vector / kVectors);
      if (first + vector < count) {
        store_vector<E>(out + (first + vector) * kVectorBytes<E>,
                        of_block >> (vector % kVectors * kElements));
      }
    }
    return;
  }
  if (row >= call.rows) return;
  const int64_t first = block * kLanes - call.column_offset;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t column = first + lane;
    if (column >= 0 && column < call.columns) {
      store_element<E>(out + (row * call.columns + column) * E::kBytes, (bits >> lane) & 1);
    }
  }
}

template <typename E>
cudaError_t launch(const MaskCall& call, cudaStream_t stream) {
  const int64_t first = call.column_offset / kLanes;
  const int64_t last = (call.column_offset + call.columns - 1) / kLanes;
  const int64_t row_blocks = last - first + 1;
  const bool vectors = call.column_offset % kLanes == 0 && call.columns % kLanes == 0 &&
                       reinterpret_cast<uintptr_t>(call.out) % kVectorBytes<E> == 0;
  const int64_t blocks = (call.rows * row_blocks + kThreads - 1) / kThreads;
  dropout_mask_kernel<E>
      <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call, row_blocks, vectors);
  return cudaGetLastError();
}

}  // namespace

cudaError_t run(const MaskCall& call, cudaStream_t stream) {
  if (call.rows == 0 || call.columns == 0) return cudaSuccess;
  switch (call.dtype) {
    case MaskDType::kBool:
      return launch<Bool>(call, stream);
    case MaskDType::kFloat32:
      return launch<Float32>(call, stream);
    case MaskDType::kFloat64:
      return launch<Float64>(call, stream);
    case MaskDType::kBFloat16:
      return launch<BFloat16>(call, stream);
    case MaskDType::kFloat16:
      return launch<Float16>(call, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fused_lora::kernels
