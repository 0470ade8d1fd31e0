// mma.sync, and the moves of 8×8 matrices between registers and shared memory: ldmatrix, stmatrix,
// movmatrix (PTX ISA 9.7.14.5).
#include <cstring>
#include <string>

#include "core/binder.h"
#include "core/block.h"
#include "core/warp.h"
#include "memory/shared_memory.h"
#include "tensor_core/fragments.h"
#include "tensor_core/registers.h"
#include "tensor_core/vector_operand.h"

namespace emulator {

namespace {

const ptx::Type kRegister{ptx::Type::Class::Bits, 32, 1};

// ---- mma.sync
// ---------------------------------------------------------------------------------------

// step.slots: D, A, B, C.
template <TensorFormat format, int k, bool half>
void run_mma(Warp& warp, const Step& step, LaneMask active) {
  if (!whole_warp(warp, step, active)) return;
  constexpr int kN = kBlockColumns;
  const Slot* d = step.slots.data();
  const Slot* a = d + accumulator_registers(half, kN);
  const Slot* b = a + a_registers(bytes_of(format), k);
  const Slot* c = b + b_registers(bytes_of(format), k);
  float left[kTileRows * k], right[k * kN], sum[kTileRows * kN];
  TileSet<kN> undefined;
  load_accumulator<half, kN>(warp, c, kN, sum, &undefined);
  const uint32_t rows = load_a<format>(warp, a, k, left);
  const uint32_t columns = load_b<format>(warp, b, k, right);
  if ((rows | columns) != 0) {
    const auto whole = [columns](int column) { return (columns >> column & 1) != 0; };
    spread_undefined<kN>(rows, whole, kN, &undefined);
  }
  multiply(format, half, summation_of(warp.block()), left, right, sum, kN, k);
  store_accumulator<half, kN>(warp, d, kN, sum, undefined);
}

template <TensorFormat format, int k, bool half>
void bind_mma_of(Binder& binder) {
  binder.done();
  bind_registers(binder, 0, accumulator_registers(half, kBlockColumns), Direction::Destination);
  bind_registers(binder, 1, a_registers(bytes_of(format), k), Direction::Source);
  bind_registers(binder, 2, b_registers(bytes_of(format), k), Direction::Source);
  bind_registers(binder, 3, accumulator_registers(half, kBlockColumns), Direction::Source);
  binder.step.run = run_mma<format, k, half>;
}

void bind_mma(Binder& binder) {
  binder.step.flow = Flow::Converged;
  if (!binder.take("sync") || !binder.take("aligned"))
    binder.unsupported("mma without .sync.aligned");
  const std::string shape = binder.next();
  if (!binder.take(shape) || !binder.take("row") || !binder.take("col")) {
    binder.unsupported("mma of this shape and layout");
  }
  std::string types;
  for (int i = 0; i < 4; ++i) {
    types += "." + binder.next();
    binder.take(binder.next());
  }
  struct Variant {
    const char* shape;
    const char* types;  // of D, A, B, C
    Bind bind;
  };
  static const Variant kVariants[] = {
      {"m16n8k16", ".f32.f16.f16.f32", bind_mma_of<TensorFormat::F16, 16, false>},
      {"m16n8k16", ".f16.f16.f16.f16", bind_mma_of<TensorFormat::F16, 16, true>},
      {"m16n8k16", ".f32.bf16.bf16.f32", bind_mma_of<TensorFormat::BF16, 16, false>},
      {"m16n8k8", ".f32.f16.f16.f32", bind_mma_of<TensorFormat::F16, 8, false>},
      {"m16n8k8", ".f16.f16.f16.f16", bind_mma_of<TensorFormat::F16, 8, true>},
      {"m16n8k8", ".f32.bf16.bf16.f32", bind_mma_of<TensorFormat::BF16, 8, false>},
      {"m16n8k8", ".f32.tf32.tf32.f32", bind_mma_of<TensorFormat::TF32, 8, false>},
      {"m16n8k4", ".f32.tf32.tf32.f32", bind_mma_of<TensorFormat::TF32, 4, false>},
  };
  for (const Variant& variant : kVariants) {
    if (shape == variant.shape && types == variant.types) return variant.bind(binder);
  }
  binder.unsupported("mma " + shape + types);
}

// ---- ldmatrix, stmatrix, movmatrix
// ------------------------------------------------------------------

constexpr int kRowBytes = 16;  // of an 8×8 matrix of 16-bit elements

struct MatrixRow {
  uint16_t values[kRowBytes / 2];
  uint16_t undefined[kRowBytes / 2];  // bits
};

// Lane 8·m + i has the address of row i of matrix m; the lanes past the last matrix have none.
struct RowAddresses {
  uint32_t of[kLanes] = {};
  LaneMask lanes;

  RowAddresses(Warp& warp, const Step& step, const Slot& base, int matrices)
      : lanes(kAllLanes >> (kLanes - 8 * matrices)) {
    warp.require_defined(step, base, lanes, "is the address of a matrix row");
    for_each_lane(lanes, [&](int l) {
      of[l] = static_cast<uint32_t>(warp.value(base, l) + static_cast<uint64_t>(step.immediate[0]));
    });
    for (int m = 0; m < matrices; ++m) {
      warp.block().counters().shared_request(step, of, LaneMask{0xff} << (8 * m), kRowBytes);
    }
  }
};

// step.slots: the base address, then a register for each matrix.
template <bool transposed>
void run_ldmatrix(Warp& warp, const Step& step, LaneMask active) {
  if (!whole_warp(warp, step, active)) return;
  const int matrices = static_cast<int>(step.slots.size()) - 1;
  const RowAddresses addresses(warp, step, step.slots[0], matrices);
  MatrixRow rows[kLanes];
  for_each_lane(addresses.lanes, [&](int l) {
    warp.block().shared().load(warp, step, l, addresses.of[l], kRowBytes, rows[l].values,
                               reinterpret_cast<uint8_t*>(rows[l].undefined));
  });
  for (int m = 0; m < matrices; ++m) {
    const Slot& destination = step.slots[static_cast<size_t>(1 + m)];
    uint32_t result[kLanes] = {}, undefined[kLanes] = {};
    for (int l = 0; l < kLanes; ++l) {
      for (int half = 0; half < 2; ++half) {
        const Element at = matrix_element(l, half, transposed);
        const MatrixRow& row = rows[8 * m + at.row];
        result[l] |= uint32_t{row.values[at.column]} << (16 * half);
        undefined[l] |= uint32_t{row.undefined[at.column]} << (16 * half);
      }
    }
    warp.store(destination, result, kAllLanes);
    for (int l = 0; l < kLanes; ++l) {
      if (undefined[l] != 0) warp.set_undefined(destination, l, undefined[l]);
    }
  }
}

template <bool transposed>
void run_stmatrix(Warp& warp, const Step& step, LaneMask active) {
  if (!whole_warp(warp, step, active)) return;
  const int matrices = static_cast<int>(step.slots.size()) - 1;
  const RowAddresses addresses(warp, step, step.slots[0], matrices);
  MatrixRow rows[kLanes];
  for (int m = 0; m < matrices; ++m) {
    const Slot& source = step.slots[static_cast<size_t>(1 + m)];
    const uint32_t* values = warp.lanes<uint32_t>(source);
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t undefined = warp.undefined_of<uint32_t>(source, l);
      for (int half = 0; half < 2; ++half) {
        const Element at = matrix_element(l, half, transposed);
        MatrixRow& row = rows[8 * m + at.row];
        row.values[at.column] = static_cast<uint16_t>(values[l] >> (16 * half));
        // Memory knows whole bytes only: one undefined bit makes its byte undefined.
        const uint32_t bits = undefined >> (16 * half);
        row.undefined[at.column] = static_cast<uint16_t>(((bits & 0xff) != 0 ? 0xff : 0) |
                                                         ((bits & 0xff00) != 0 ? 0xff00 : 0));
      }
    }
  }
  for_each_lane(addresses.lanes, [&](int l) {
    warp.block().shared().store(warp, step, l, addresses.of[l], kRowBytes, rows[l].values,
                                reinterpret_cast<const uint8_t*>(rows[l].undefined));
  });
}

// The modifiers after .sync.aligned come in any order: nvcc writes .x4.m8n8, LLVM .m8n8.x4.
void bind_matrix_move(Binder& binder, int registers, int address, Direction direction,
                      Handler plain, Handler transposed) {
  binder.step.flow = Flow::Converged;
  if (!binder.take("sync") || !binder.take("aligned")) binder.unsupported("without .sync.aligned");
  int matrices = 0;
  bool trans = false, shape = false, shared = false, type = false;
  for (;;) {
    if (binder.take("x1")) {
      matrices = 1;
    } else if (binder.take("x2")) {
      matrices = 2;
    } else if (binder.take("x4")) {
      matrices = 4;
    } else if (binder.take("trans")) {
      trans = true;
    } else if (binder.take("m8n8")) {
      shape = true;
    } else if (binder.take("shared") || binder.take("shared::cta")) {
      shared = true;
    } else if (binder.take("b16")) {
      type = true;
    } else {
      break;
    }
  }
  binder.done();
  if (matrices == 0 || !shape || !shared || !type) {
    binder.unsupported("a matrix move other than .m8n8.x1/.x2/.x4.shared.b16");
  }
  binder.step.slots.push_back(binder.address(address, &binder.step.immediate[0]));
  bind_registers(binder, registers, matrices, direction);
  binder.step.run = trans ? transposed : plain;
}

void bind_ldmatrix(Binder& binder) {
  bind_matrix_move(binder, 0, 1, Direction::Destination, run_ldmatrix<false>, run_ldmatrix<true>);
}

void bind_stmatrix(Binder& binder) {
  bind_matrix_move(binder, 1, 0, Direction::Source, run_stmatrix<false>, run_stmatrix<true>);
}

// step.slots: destination, source. The transpose of one 8×8 matrix.
void run_movmatrix(Warp& warp, const Step& step, LaneMask active) {
  if (!whole_warp(warp, step, active)) return;
  const uint32_t* source = warp.lanes<uint32_t>(step.slots[1]);
  uint32_t values[kLanes] = {}, undefined[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t bits = warp.undefined_of<uint32_t>(step.slots[1], l);
    for (int half = 0; half < 2; ++half) {
      const Element at = matrix_element(l, half, true);
      const int lane = at.row * 4 + at.column / 2, shift = 16 * (at.column % 2);
      values[lane] |= (source[l] >> (16 * half) & 0xffff) << shift;
      undefined[lane] |= (bits >> (16 * half) & 0xffff) << shift;
    }
  }
  warp.store(step.slots[0], values, kAllLanes);
  for (int l = 0; l < kLanes; ++l) {
    if (undefined[l] != 0) warp.set_undefined(step.slots[0], l, undefined[l]);
  }
}

void bind_movmatrix(Binder& binder) {
  binder.step.flow = Flow::Converged;
  for (const char* modifier : {"sync", "aligned", "m8n8", "trans", "b16"}) {
    if (!binder.take(modifier)) binder.unsupported("movmatrix other than .m8n8.trans.b16");
  }
  binder.done();
  binder.step.slots = {binder.destination(0, kRegister), binder.source(1, kRegister)};
  binder.step.run = run_movmatrix;
}

}  // namespace

void add_matrix(Opcodes& opcodes) {
  opcodes.add("mma", bind_mma);
  opcodes.add("ldmatrix", bind_ldmatrix);
  opcodes.add("stmatrix", bind_stmatrix);
  opcodes.add("movmatrix", bind_movmatrix);
}

}  // namespace emulator
