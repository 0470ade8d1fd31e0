#include "tensor_core/shared_operand.h"

#include <algorithm>
#include <cstring>

namespace emulator {

namespace {

float value_at(TensorFormat format, const uint8_t* bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, bytes, static_cast<size_t>(bytes_of(format)));
  switch (format) {
    case TensorFormat::F16:
      return operand_value<TensorFormat::F16>(bits);
    case TensorFormat::BF16:
      return operand_value<TensorFormat::BF16>(bits);
    default:
      return operand_value<TensorFormat::TF32>(bits);
  }
}

}  // namespace

template <class Visit>
void SharedOperand::for_each_chunk(Visit visit) const {
  const auto bytes = static_cast<uint32_t>(bytes_of(format));
  const uint32_t row_step = mn_major ? kChunk / bytes : 1;
  const uint32_t k_step = mn_major ? 1 : kChunk / bytes;
  for (uint32_t row = 0; row < rows; row += row_step) {
    for (uint32_t i = 0; i < k; i += k_step) {
      visit(element_address(matrix, mn_major, bytes, first_row + row, i), row, i);
    }
  }
}

std::vector<SharedOperand::Range> SharedOperand::ranges() const {
  std::vector<uint32_t> chunks;
  for_each_chunk([&](uint32_t address, uint32_t, uint32_t) { chunks.push_back(address); });
  std::sort(chunks.begin(), chunks.end());
  std::vector<Range> ranges;
  for (const uint32_t chunk : chunks) {
    if (!ranges.empty() && chunk <= ranges.back().end) {
      ranges.back().end = chunk + kChunk;
    } else {
      ranges.push_back({chunk, chunk + kChunk});
    }
  }
  return ranges;
}

SharedOperand::Rows SharedOperand::read(SharedMemory& shared, float sign, float* values,
                                        uint32_t row_stride, uint32_t k_stride) const {
  Rows undefined;
  const auto bytes = static_cast<uint32_t>(bytes_of(format));
  const uint32_t stride = mn_major ? row_stride : k_stride;
  for_each_chunk([&](uint32_t address, uint32_t row, uint32_t i) {
    float* to = values + row * row_stride + i * k_stride;
    if (!shared.inside(address, kChunk)) {
      for (uint32_t e = 0; e < kChunk / bytes; ++e) to[e * stride] = 0;
      return;
    }
    const uint8_t* from = shared.data(address);
    for (uint32_t e = 0; e < kChunk / bytes; ++e) {
      to[e * stride] = sign * value_at(format, from + e * bytes);
    }
    const uint8_t* bad = shared.undefined(address);
    for (uint32_t byte = 0; byte < kChunk; ++byte) {
      if (bad[byte] != 0) undefined.set(row + (mn_major ? byte / bytes : 0));
    }
  });
  return undefined;
}

}  // namespace emulator
