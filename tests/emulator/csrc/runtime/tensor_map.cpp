#include "runtime/tensor_map.h"

#include <cstring>
#include <string>

#include "common/error.h"

namespace emulator {

namespace {

struct ElementType {
  CUtensorMapDataType type;
  int bytes;
  bool is_float;
};
constexpr ElementType kElementTypes[] = {
    {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, false},       {CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, false},
    {CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, false},      {CU_TENSOR_MAP_DATA_TYPE_INT32, 4, false},
    {CU_TENSOR_MAP_DATA_TYPE_UINT64, 8, false},      {CU_TENSOR_MAP_DATA_TYPE_INT64, 8, false},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, true},      {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, true},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 8, true},      {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, true},
    {CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ, 4, true},  {CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, 4, true},
    {CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ, 4, true},
};

constexpr uint64_t kMaxSize = uint64_t{1} << 32;
constexpr uint64_t kStrideEnd = uint64_t{1} << 40;
constexpr uint32_t kMaxBox = 256;
constexpr uint32_t kMaxElementStride = 8;

const ElementType& element_type(CUtensorMapDataType type) {
  for (const ElementType& known : kElementTypes) {
    if (known.type == type) return known;
  }
  if (type > CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ &&
      type <= CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B) {
    throw Error("tensorDataType " + std::to_string(type) + " (packed) is not emulated");
  }
  throw ArgumentError("tensorDataType is " + std::to_string(type));
}

// Bytes within which the swizzle moves elements; 0: it moves none.
uint32_t swizzle_span(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return 0;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    default:
      return 128;
  }
}

void require(bool holds, const std::string& argument, uint64_t value, const std::string& rule) {
  if (!holds)
    throw ArgumentError(argument + " is " + std::to_string(value) + ", it must be " + rule);
}

std::string element(const char* argument, uint32_t index) {
  return std::string(argument) + "[" + std::to_string(index) + "]";
}

}  // namespace

bool decode(const void* bytes128, TensorMap* map) {
  std::memcpy(map, bytes128, sizeof *map);
  return map->magic == TensorMap::kMagic;
}

TensorMap encode(CUtensorMapDataType data_type, uint32_t rank, const void* address,
                 const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                 const uint32_t* element_stride, CUtensorMapInterleave interleave,
                 CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                 CUtensorMapFloatOOBfill fill) {
  const ElementType& type = element_type(data_type);
  const bool interleaved = interleave != CU_TENSOR_MAP_INTERLEAVE_NONE;
  const bool interleaved_32 = interleave == CU_TENSOR_MAP_INTERLEAVE_32B;
  require(interleave <= CU_TENSOR_MAP_INTERLEAVE_32B, "interleave", interleave, "an enumerator");
  require(swizzle <= CU_TENSOR_MAP_SWIZZLE_128B_ATOM_64B, "swizzle", swizzle, "an enumerator");
  require(l2_promotion <= CU_TENSOR_MAP_L2_PROMOTION_L2_256B, "l2Promotion", l2_promotion,
          "an enumerator");
  require(fill <= CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA, "oobFill", fill,
          "an enumerator");
  require(rank >= (interleaved ? 3 : 1) && rank <= 5, "tensorRank", rank,
          interleaved ? "3 to 5 with an interleave" : "1 to 5");

  TensorMap map{};
  map.magic = TensorMap::kMagic;
  map.address = reinterpret_cast<uint64_t>(address);
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = static_cast<uint8_t>(type.bytes);
  map.data_type = static_cast<uint8_t>(data_type);
  map.interleave = static_cast<uint8_t>(interleave);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.l2_promotion = static_cast<uint8_t>(l2_promotion);
  map.nan_fill = fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;

  const uint64_t alignment = interleaved_32 ? 32 : 16;
  const std::string aligned = "a multiple of " + std::to_string(alignment);
  require(map.address % alignment == 0, "globalAddress", map.address, aligned);
  if (size == nullptr) throw ArgumentError("globalDim is null");
  if (stride == nullptr && rank > 1) throw ArgumentError("globalStrides is null");
  if (box == nullptr) throw ArgumentError("boxDim is null");
  if (element_stride == nullptr) throw ArgumentError("elementStrides is null");
  for (uint32_t i = 0; i < rank; ++i) {
    require(size[i] >= 1 && size[i] <= kMaxSize, element("globalDim", i), size[i], "1 to 2^32");
    require(box[i] >= 1 && box[i] <= kMaxBox, element("boxDim", i), box[i], "1 to 256");
    const bool ignored = i == 0 && !interleaved;
    require(ignored || (element_stride[i] >= 1 && element_stride[i] <= kMaxElementStride),
            element("elementStrides", i), element_stride[i], "1 to 8");
    map.size[i] = size[i];
    map.box[i] = static_cast<uint16_t>(box[i]);
    map.element_stride[i] = ignored ? 1 : static_cast<uint8_t>(element_stride[i]);
  }
  for (uint32_t i = 0; i + 1 < rank; ++i) {
    require(stride[i] % alignment == 0 && stride[i] < kStrideEnd, element("globalStrides", i),
            stride[i], aligned + " and less than 2^40");
    map.stride[i] = stride[i];
  }

  const uint32_t inner_bytes = box[0] * type.bytes;
  const uint32_t span = swizzle_span(swizzle);
  if (!interleaved) {
    require(inner_bytes % 16 == 0, "boxDim[0] in bytes", inner_bytes, "a multiple of 16");
    require(span == 0 || inner_bytes <= span, "boxDim[0] in bytes", inner_bytes,
            "at most the swizzle's " + std::to_string(span));
  }
  require(!interleaved_32 || swizzle == CU_TENSOR_MAP_SWIZZLE_32B, "swizzle", swizzle,
          "CU_TENSOR_MAP_SWIZZLE_32B with CU_TENSOR_MAP_INTERLEAVE_32B");
  require(!map.nan_fill || type.is_float, "oobFill", fill, "NONE for integers");
  return map;
}

}  // namespace emulator
