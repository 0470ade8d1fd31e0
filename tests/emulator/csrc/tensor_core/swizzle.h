// Matrices in shared memory as wgmma reads them: matrix descriptors and swizzled layouts (PTX
// ISA 9.7.15.5.1, "Shared Memory Matrix Layout", "Strides" and "Matrix Descriptor Format").
#pragma once

#include <cstdint>

namespace emulator {

// The numbers are the encoding of a matrix descriptor. The widths are the bytes that the pattern
// permutes.
enum class Swizzle : uint8_t { None = 0, B128 = 1, B64 = 2, B32 = 3 };

// Chunks of 16 bytes in the width of the pattern.
constexpr uint32_t chunks_of(Swizzle mode) {
  return mode == Swizzle::None ? 1 : 16u >> static_cast<uint32_t>(mode);
}

// Exchanges 16-byte chunks within their 128-byte line by the line's number: address bits 4.. are
// xored with bits 7.., three of them for 128 bytes, two for 64, one for 32. Tensor-map copies write
// the same pattern.
constexpr uint32_t swizzle(uint32_t address, Swizzle mode) {
  return address ^ ((address >> 7 & (chunks_of(mode) - 1)) << 4);
}

struct MatrixDescriptor {
  uint32_t start = 0;    // shared address, bytes
  uint32_t leading = 0;  // leading dimension byte offset
  uint32_t stride = 0;   // stride dimension byte offset
  uint32_t phase = 0;    // base offset: the 128-byte line, modulo 8, in which the pattern begins
  Swizzle mode = Swizzle::None;

  explicit constexpr MatrixDescriptor(uint64_t bits)
      : start(field(bits, 0)),
        leading(field(bits, 16)),
        stride(field(bits, 32)),
        phase(static_cast<uint32_t>(bits >> 49 & 7)),
        mode(static_cast<Swizzle>(bits >> 62)) {}

 private:
  static constexpr uint32_t field(uint64_t bits, int low) {
    return static_cast<uint32_t>(bits >> low & 0x3fff) << 4;
  }
};

// The address of an element. A's rows are its M rows, B's "rows" are its N columns. Elements that
// follow one another along K are contiguous in 16-byte chunks (K-major), or those along M or N are
// (MN-major).
//
// With T elements in a chunk and W chunks in the width of the pattern, the byte offsets before
// swizzling are those of CuTe's canonical layouts (cute/atom/mma_traits_sm90_gmma.hpp), here in
// chunks, L and S the leading and stride offsets:
//   K-major, none:       ((8, m), (T, 2)) : ((1, S), (element, L))
//   K-major, swizzled:   ((8, m), (T, 2)) : ((W, S), (element, 1))
//   MN-major, none:      ((T, 1, m), (8, k)) : ((element, ·, S), (1, L))
//   MN-major, swizzled:  ((T, W, m), (8, k)) : ((element, 1, L), (W, S))
constexpr uint32_t element_address(const MatrixDescriptor& matrix, bool mn_major,
                                   uint32_t element_bytes, uint32_t row, uint32_t k) {
  const bool plain = matrix.mode == Swizzle::None;
  const uint32_t width = 16 * chunks_of(matrix.mode);
  uint32_t offset = 0;
  if (mn_major) {
    const uint32_t along = row * element_bytes;
    offset = along % width + along / width * (plain ? matrix.stride : matrix.leading) +
             k % 8 * width + k / 8 * (plain ? matrix.leading : matrix.stride);
  } else {
    const uint32_t along = k * element_bytes;
    offset = row % 8 * width + row / 8 * matrix.stride +
             (plain ? along % 16 + along / 16 * matrix.leading : along);
  }
  // The pattern counts lines from its own start, not from address 0.
  const uint32_t origin = matrix.phase * 128;
  return swizzle(matrix.start + offset - origin, matrix.mode) + origin;
}

}  // namespace emulator
