// The element types of the kernels, as device code sees them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/lora_linear.h"

namespace fused_lora::kernels {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <typename T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<bf16>() {
  return DType::kBFloat16;
}
template <>
constexpr DType dtype_of<fp16>() {
  return DType::kFloat16;
}

__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(bf16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(fp16 value) {
  return __half2float(value);
}

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return __float2half_rn(value);
}

// Two neighbours in one register, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// A register of two neighbours as two floats; exact.
template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<bf16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack_pair<fp16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Whether no element of an array of any shape is NaN.
__device__ __forceinline__ bool are_numbers(const float& value) {
  return value == value;
}
template <typename T, int kCount>
__device__ __forceinline__ bool are_numbers(const T (&values)[kCount]) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) all &= are_numbers(values[i]);
  return all;
}

template <int kCount>
__device__ __forceinline__ void set_to_zero(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = 0.0f;
}
template <typename T, int kRows, int kCount>
__device__ __forceinline__ void set_to_zero(T (&values)[kRows][kCount]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) set_to_zero(values[i]);
}

// element[index] of an array whose dtype is known at run time only, as fp32.
__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const bf16*>(data)[index]);
    case DType::kFloat16:
      return to_float(static_cast<const fp16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ __forceinline__ void store_from_float(void* data, DType dtype, int64_t index,
                                                 float value) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<bf16*>(data)[index] = from_float<bf16>(value);
      return;
    case DType::kFloat16:
      static_cast<fp16*>(data)[index] = from_float<fp16>(value);
      return;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

}  // namespace fused_lora::kernels
