// The tensor cores' pure functions, for tests against tables and simulators that others wrote.
#include <cstdint>
#include <vector>

#include "tensor_core/formats.h"
#include "tensor_core/fragments.h"
#include "tensor_core/multiply.h"
#include "tensor_core/swizzle.h"

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using emulator::Element;
using emulator::TensorFormat;

void put(const Element& element, int* row_and_column) {
  row_and_column[0] = element.row;
  row_and_column[1] = element.column;
}

float value_of(TensorFormat format, uint32_t bits) {
  switch (format) {
    case TensorFormat::F16:
      return emulator::operand_value<TensorFormat::F16>(bits);
    case TensorFormat::BF16:
      return emulator::operand_value<TensorFormat::BF16>(bits);
    default:
      return emulator::operand_value<TensorFormat::TF32>(bits);
  }
}

std::vector<float> values_of(TensorFormat format, const uint32_t* bits, int count) {
  std::vector<float> values;
  for (int i = 0; i < count; ++i) values.push_back(value_of(format, bits[i]));
  return values;
}

}  // namespace

// fragments.h: {row, column} of a lane's value.
EMULATOR_EXPORT void emulator_a_element(int element_bytes, int lane, int value, int* element) {
  put(emulator::a_element(element_bytes, lane, value), element);
}
EMULATOR_EXPORT void emulator_b_element(int element_bytes, int lane, int value, int* element) {
  put(emulator::b_element(element_bytes, lane, value), element);
}
EMULATOR_EXPORT void emulator_accumulator_element(int lane, int value, int* element) {
  put(emulator::accumulator_element(lane, value), element);
}
EMULATOR_EXPORT void emulator_matrix_element(int lane, int half, int transposed, int* element) {
  put(emulator::matrix_element(lane, half, transposed != 0), element);
}

// swizzle.h; `mode` is the encoding of a matrix descriptor.
EMULATOR_EXPORT uint32_t emulator_swizzle(uint32_t address, int mode) {
  return emulator::swizzle(address, static_cast<emulator::Swizzle>(mode));
}
EMULATOR_EXPORT uint32_t emulator_element_address(uint64_t descriptor, int mn_major,
                                                  uint32_t element_bytes, uint32_t row,
                                                  uint32_t k) {
  return emulator::element_address(emulator::MatrixDescriptor(descriptor), mn_major != 0,
                                   element_bytes, row, k);
}

// d (16×n) += a (16×k) · b (k×n), row-major bit patterns. `format`: 0 f16, 1 bf16, 2 tf32; `half`:
// d is f16 instead of f32; `compute_capability_major`: whose truncating sums, 0 for plain fp32.
EMULATOR_EXPORT void emulator_multiply(int format, int half, int compute_capability_major,
                                       const uint32_t* a, const uint32_t* b, uint32_t* d, int n,
                                       int k) {
  const auto type = static_cast<TensorFormat>(format);
  const std::vector<float> left = values_of(type, a, emulator::kTileRows * k);
  const std::vector<float> right = values_of(type, b, k * n);
  std::vector<float> sums;
  for (int i = 0; i < emulator::kTileRows * n; ++i) {
    sums.push_back(half != 0 ? value_of(TensorFormat::F16, d[i]) : emulator::bit_cast<float>(d[i]));
  }
  const emulator::Summation summation =
      compute_capability_major == 0 ? emulator::Summation{}
                                    : emulator::Summation::truncating(compute_capability_major);
  emulator::multiply(type, half != 0, summation, left.data(), right.data(), sums.data(), n, k);
  for (int i = 0; i < emulator::kTileRows * n; ++i) {
    const float sum = sums[static_cast<size_t>(i)];
    d[i] =
        half != 0 ? emulator::encode<emulator::Binary16>(sum) : emulator::bit_cast<uint32_t>(sum);
  }
}
