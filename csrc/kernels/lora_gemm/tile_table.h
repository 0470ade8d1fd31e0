// The tiles that lora_gemm is compiled for, and the choice among them. Pure host code.
#pragma once

#include <array>

#include "kernels/stages.h"

namespace fused_lora::kernels::lora_gemm {

// One CTA's share of the output and how its warps divide it. The depth of a tile is
// kPackedTileBytes: 32 elements of 16 bits, 16 of fp32, two steps of the mma's depth in either
// case.
struct Tile {
  int rows, columns;            // of the output
  int warp_rows, warp_columns;  // of the output, one warp
  int stages;                   // tiles of the reduction in shared memory
  int ctas;                     // on one SM, which bounds the registers
  // Of the tensor cores' rate, relative to the large tile: what the choice weighs waves by. A
  // model, from the bytes of shared memory that a tile's operands are read from for each mma; not a
  // measurement.
  double efficiency;

  constexpr int warps() const { return rows / warp_rows * (columns / warp_columns); }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int stage_bytes() const { return (rows + columns) * kPackedTileBytes; }
  constexpr int shared_bytes() const { return stages * stage_bytes(); }
};

// Large: a 64×64 warp tile reads the fewest bytes of shared memory for each mma that 255 registers
// a thread allow (128 hold the sums, 64 two steps' fragments). Three stages are 48 KiB, so that two
// CTAs share an SM of every device from sm_80 on, those of 100 KiB (L4, 4090, 5090) included; a
// fourth would leave these one CTA.
inline constexpr Tile kLarge = {128, 128, 64, 64, 3, 2, 1.0};
// The same for tf32, whose fragments are rounded in registers: half the sums leave room for it.
inline constexpr Tile kLargeTf32 = {128, 64, 64, 32, 3, 2, 1.0};
// Medium: a quarter of the output, for shapes whose large tiles would leave multiprocessors idle.
// Four stages are 32 KiB: three CTAs share an SM of 100 KiB, and five one of 164 KiB or more.
inline constexpr Tile kMedium = {64, 64, 32, 32, 4, 3, 0.75};
// Few rows: a call of at most 32 is bound by reading W, so a tile is as narrow in x as can be, and
// six stages of 6 KiB keep more of W under way; two or three CTAs share an SM.
inline constexpr Tile kFewRows = {32, 64, 32, 16, 6, 2, 0.5};

enum class TileName : int32_t { kLarge, kMedium, kFewRows };
inline constexpr std::array kTileNames = {TileName::kLarge, TileName::kMedium, TileName::kFewRows};

constexpr const Tile& tile_of(TileName name, Arithmetic arithmetic) {
  switch (name) {
    case TileName::kLarge:
      return arithmetic == Arithmetic::kTf32 ? kLargeTf32 : kLarge;
    case TileName::kMedium:
      return kMedium;
    default:
      return kFewRows;
  }
}

// The tile with which the busiest multiprocessor has least to do: its CTAs, ⌈tiles /
// multiprocessors⌉, at a tile's area (padding included) and efficiency each.
TileName choose_tile(int64_t rows, int64_t columns, Arithmetic arithmetic, const Device& device);

}  // namespace fused_lora::kernels::lora_gemm
