// Tensor maps: the 128 opaque bytes that cuTensorMapEncodeTiled fills and bulk tensor copies read.
#pragma once

#include <cstdint>

#include "runtime/cuda_api.h"

namespace emulator {

// Our own encoding: real ones differ. Dimension 0 is the innermost one, whose elements are
// adjacent.
struct TensorMap {
  // Tells a map that was encoded from other bytes.
  static constexpr uint64_t kMagic = 0x50414D524F534E54;  // "TNSORMAP"

  uint64_t magic;
  uint64_t address;    // global
  uint64_t size[5];    // elements
  uint64_t stride[4];  // bytes, of dimensions 1 to 4
  uint16_t box[5];     // elements
  uint8_t element_stride[5];
  uint8_t rank;
  uint8_t element_bytes;
  uint8_t data_type;     // CUtensorMapDataType
  uint8_t interleave;    // CUtensorMapInterleave
  uint8_t swizzle;       // CUtensorMapSwizzle
  uint8_t l2_promotion;  // CUtensorMapL2promotion
  bool nan_fill;         // elements out of bounds are NaN instead of zero
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// False where the 128 bytes hold no map.
bool decode(const void* bytes128, TensorMap* map);

// The arguments are those of cuTensorMapEncodeTiled. Throws ArgumentError that names the argument
// whose documented requirement is not met, and Error for the packed 4-bit and 6-bit types, which
// are not emulated.
TensorMap encode(CUtensorMapDataType data_type, uint32_t rank, const void* address,
                 const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                 const uint32_t* element_stride, CUtensorMapInterleave interleave,
                 CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                 CUtensorMapFloatOOBfill fill);

}  // namespace emulator
