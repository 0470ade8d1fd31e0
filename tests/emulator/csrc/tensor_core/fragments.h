// Which element of a matrix each lane of a warp holds: the fragments of PTX ISA 9.7.14.5 ("Matrix
// Fragments for mma.m16n8k8" and its siblings, ldmatrix, stmatrix, movmatrix) and of 9.7.15.5.1
// (wgmma "Register Fragments").
//
// A lane's fragment is a list of values, packed in order into 32-bit registers: value v of a 16-bit
// type is half v % 2 of register v / 2. wgmma has the fragments of mma.sync, with more columns:
// warp w of a warpgroup holds rows 16·(w % 4) and the 15 that follow, and all N / 8 blocks of
// columns one after another.
#pragma once

namespace emulator {

struct Element {
  int row;
  int column;
};

constexpr int kTileRows = 16;     // of A and D, in one warp
constexpr int kBlockColumns = 8;  // of B and D, in one mma

// A is 16×K: 8×(16 bytes) quarters, the lower rows before the right columns.
constexpr Element a_element(int element_bytes, int lane, int value) {
  const int packed = 4 / element_bytes;  // values of one register
  const int quarter = value / packed;
  return {lane / 4 + 8 * (quarter % 2), packed * (lane % 4 + 4 * (quarter / 2)) + value % packed};
}

// B is K×8: row k, column n.
constexpr Element b_element(int element_bytes, int lane, int value) {
  const int packed = 4 / element_bytes;
  return {packed * (lane % 4 + 4 * (value / packed)) + value % packed, lane / 4};
}

// C and D are 16×N, whatever their type: pairs of neighbours, the lower rows before the next 8
// columns.
constexpr Element accumulator_element(int lane, int value) {
  return {lane / 4 + 8 * (value / 2 % 2), kBlockColumns * (value / 4) + 2 * (lane % 4) + value % 2};
}

// An 8×8 matrix of 16-bit elements in one register: ldmatrix, stmatrix and movmatrix.
constexpr Element matrix_element(int lane, int half, bool transposed) {
  const int row = lane / 4, column = 2 * (lane % 4) + half;
  return transposed ? Element{column, row} : Element{row, column};
}

// Registers of a fragment: A 16×k, B k×8, C and D 16×n.
constexpr int a_registers(int element_bytes, int k) {
  return kTileRows * k * element_bytes / 128;
}
constexpr int b_registers(int element_bytes, int k) {
  return kBlockColumns * k * element_bytes / 128;
}
constexpr int accumulator_registers(bool half, int n) {
  return kTileRows * n * (half ? 2 : 4) / 128;
}

}  // namespace emulator
