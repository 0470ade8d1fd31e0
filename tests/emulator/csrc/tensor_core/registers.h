// A warp's registers as the matrices of fragments.h, and back, with what is undefined in them: an
// undefined element of A makes its row of D undefined, one of B its column, one of C itself.
#pragma once

#include <bitset>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "core/block.h"
#include "core/warp.h"
#include "runtime/machine.h"
#include "tensor_core/formats.h"
#include "tensor_core/fragments.h"
#include "tensor_core/multiply.h"

namespace emulator {

// Elements of D (16×n), numbered row by row.
template <int kColumns>
using TileSet = std::bitset<static_cast<size_t>(kTileRows) * kColumns>;

// These instructions are defined for whole warps only (.sync.aligned); anything less is a finding.
inline bool whole_warp(Warp& warp, const Step& step, LaneMask active) {
  if (active == kAllLanes) return true;
  warp.report(Check::Convergence, step, first_lane(active),
              "only " + std::to_string(count(active)) +
                  " of the warp's 32 lanes run an instruction that takes all of them");
  return false;
}

inline Summation summation_of(const Block& block) {
  return block.settings().truncating_tensor_cores ? Summation::truncating(block.limits().major)
                                                  : Summation{};
}

// A register of A or of Bᵀ holds eight rows of 16 bytes, one after another: four lanes a row.
template <TensorFormat format>
struct OperandRegister {
  static constexpr int kPacked = 4 / bytes_of(format);
  static constexpr int kRows = 8, kColumns = 4 * kPacked;
  using Word = std::conditional_t<kPacked == 2, uint16_t, uint32_t>;
  Word words[kRows][kColumns];

  OperandRegister(const Warp& warp, const Slot& slot) {
    static_assert(sizeof words == kLanes * sizeof(uint32_t));
    std::memcpy(words, warp.lanes<uint32_t>(slot), sizeof words);
  }
  // The lanes that hold a row; the row's first value is the first of its lowest lane.
  static constexpr LaneMask lanes_of(int row) { return LaneMask{0xf} << (4 * row); }
};

// Reads A (16×k); the result has a bit for each row with something undefined in it.
template <TensorFormat format>
uint32_t load_a(const Warp& warp, const Slot* slots, int k, float* a) {
  using Register = OperandRegister<format>;
  uint32_t undefined = 0;
  for (int r = 0; r < a_registers(bytes_of(format), k); ++r) {
    const Register values(warp, slots[r]);
    const LaneMask tainted = warp.tainted(slots[r]);
    for (int i = 0; i < Register::kRows; ++i) {
      const Element at = a_element(bytes_of(format), 4 * i, r * Register::kPacked);
      float* row = a + at.row * k + at.column;
      for (int j = 0; j < Register::kColumns; ++j)
        row[j] = operand_value<format>(values.words[i][j]);
      if ((tainted & Register::lanes_of(i)) != 0) undefined |= 1u << at.row;
    }
  }
  return undefined;
}

// Reads B (k×8); the result has a bit for each column.
template <TensorFormat format>
uint32_t load_b(const Warp& warp, const Slot* slots, int k, float* b) {
  using Register = OperandRegister<format>;
  uint32_t undefined = 0;
  for (int r = 0; r < b_registers(bytes_of(format), k); ++r) {
    const Register values(warp, slots[r]);
    const LaneMask tainted = warp.tainted(slots[r]);
    for (int i = 0; i < Register::kRows; ++i) {
      const Element at = b_element(bytes_of(format), 4 * i, r * Register::kPacked);
      float* column = b + at.row * kBlockColumns + at.column;
      for (int j = 0; j < Register::kColumns; ++j) {
        column[j * kBlockColumns] = operand_value<format>(values.words[i][j]);
      }
      if ((tainted & Register::lanes_of(i)) != 0) undefined |= 1u << at.column;
    }
  }
  return undefined;
}

// Reads C (16×n), fp32 or packed fp16.
template <bool half, int kColumns>
void load_accumulator(const Warp& warp, const Slot* slots, int n, float* c,
                      TileSet<kColumns>* undefined) {
  constexpr int kPacked = half ? 2 : 1;
  constexpr uint32_t kValueBits = half ? 0xffff : ~0u;
  for (int r = 0; r < accumulator_registers(half, n); ++r) {
    const uint32_t* lanes = warp.lanes<uint32_t>(slots[r]);
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < kPacked; ++i) {
        const Element at = accumulator_element(l, r * kPacked + i);
        c[at.row * n + at.column] =
            half ? decode<Binary16>(static_cast<uint16_t>(lanes[l] >> (16 * i)))
                 : bit_cast<float>(lanes[l]);
      }
    }
    for_each_lane(warp.tainted(slots[r]), [&](int l) {
      const uint32_t bits = warp.undefined_of<uint32_t>(slots[r], l);
      for (int i = 0; i < kPacked; ++i) {
        if ((bits >> (16 * i) & kValueBits) == 0) continue;
        const Element at = accumulator_element(l, r * kPacked + i);
        undefined->set(static_cast<size_t>(at.row * n + at.column));
      }
    });
  }
}

// Writes D (16×n).
template <bool half, int kColumns>
void store_accumulator(Warp& warp, const Slot* slots, int n, const float* d,
                       const TileSet<kColumns>& undefined) {
  constexpr int kPacked = half ? 2 : 1;
  constexpr uint32_t kValueBits = half ? 0xffff : ~0u;
  const bool any = undefined.any();
  for (int r = 0; r < accumulator_registers(half, n); ++r) {
    uint32_t lanes[kLanes] = {};
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < kPacked; ++i) {
        const Element at = accumulator_element(l, r * kPacked + i);
        const float value = d[at.row * n + at.column];
        lanes[l] |=
            half ? uint32_t{encode<Binary16>(value)} << (16 * i) : bit_cast<uint32_t>(value);
      }
    }
    warp.store(slots[r], lanes, kAllLanes);
    if (!any) continue;
    for (int l = 0; l < kLanes; ++l) {
      uint32_t bits = 0;
      for (int i = 0; i < kPacked; ++i) {
        const Element at = accumulator_element(l, r * kPacked + i);
        if (undefined[static_cast<size_t>(at.row * n + at.column)]) bits |= kValueBits << (16 * i);
      }
      warp.set_undefined(slots[r], l, bits);
    }
  }
}

// Adds whole rows and columns; `is_undefined(column)` tells of B.
template <int kColumns, class Columns>
void spread_undefined(uint32_t rows, Columns is_undefined, int n, TileSet<kColumns>* undefined) {
  for (int column = 0; column < n; ++column) {
    const bool whole = is_undefined(column);
    for (int row = 0; row < kTileRows; ++row) {
      if (whole || (rows >> row & 1) != 0) undefined->set(static_cast<size_t>(row * n + column));
    }
  }
}

}  // namespace emulator
