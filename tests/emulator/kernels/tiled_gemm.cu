// C = A·Bᵀ on sm_80, in bf16 with fp32 accumulation: A m×k, B n×k and C m×n, all row-major and
// dense. k is a multiple of 8, so that a copy of 16 bytes lies wholly inside a row or wholly
// outside; m and n are any.
//
// A block of four warps makes one 64×64 tile of C at a time, a warp 32×32 of it. Shared memory
// holds either of
//   main loop   3 stages × (A 64×32, B 64×32) of bf16     24 KiB
//   epilogue    64×64 fp32, rows padded to 68 elements    17 KiB
// A row of a stage is four chunks of 16 bytes. Chunk c of row r lies at c ^ (r / 2 % 4): two rows
// fill the 32 banks, so that the eight rows that ldmatrix reads at once touch every bank once.
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int kTile = 64;   // rows and columns of a tile of C
constexpr int kDepth = 32;  // of k, a stage
constexpr int kStages = 3;
constexpr int kThreads = 128;
constexpr int kChunk = 8;  // elements that one cp.async copies
constexpr int kChunksPerRow = kDepth / kChunk;
constexpr int kPitch = kTile + 4;  // of the epilogue's rows, so that they begin on other banks
constexpr int kWarpTile = 32;
constexpr int kMmaRows = 16, kMmaColumns = 8, kMmaDepth = 16;
constexpr int kRowSteps = kWarpTile / kMmaRows, kColumnSteps = kWarpTile / kMmaColumns;

using Element = __nv_bfloat16;
// Fragment (i, j) of mma.m16n8k16, four values a lane: rows lane/4 and lane/4 + 8, columns
// 2·(lane%4) and the next.
using Accumulators = float[kRowSteps][kColumnSteps][4];

struct Stage {
  Element a[kTile * kDepth];
  Element b[kTile * kDepth];
};
union Storage {
  Stage stages[kStages];
  float c[kTile * kPitch];
};

struct Problem {
  const Element *a, *b;
  int m, n, k;
};

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ int swizzled(int row, int chunk) {
  return (row * kChunksPerRow + (chunk ^ (row / 2 % kChunksPerRow))) * kChunk;
}

// 16 bytes to shared memory; zeros where `inside` does not hold, and then nothing is read.
__device__ void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8×8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ void load_matrices(uint32_t (&r)[4], const Element* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 64 rows from `row` on, kDepth columns from `column` on, of a matrix of `rows` rows and k columns.
__device__ void copy_operand(Element* to, const Element* from, int rows, int k, int row,
                             int column) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kChunksPerRow; i += kThreads) {
    const int r = i / kChunksPerRow, chunk = i % kChunksPerRow;
    const bool inside = row + r < rows && column + chunk * kChunk < k;
    const int64_t offset = inside ? static_cast<int64_t>(row + r) * k + column + chunk * kChunk : 0;
    copy_async(to + swizzled(r, chunk), from + offset, inside);
  }
}

__device__ void multiply_stage(Accumulators& c, const Stage& stage, int warp_row, int warp_column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kDepth; k += kMmaDepth) {
    const int chunk = k / kChunk + lane / 16;
    uint32_t a[kRowSteps][4], b[kColumnSteps / 2][4];
#pragma unroll
    for (int i = 0; i < kRowSteps; ++i) {
      load_matrices(a[i], stage.a + swizzled(warp_row + i * kMmaRows + lane % 16, chunk));
    }
    // Sixteen rows of B are two fragments: matrices 0 and 2 make the first, 1 and 3 the second.
#pragma unroll
    for (int j = 0; j < kColumnSteps / 2; ++j) {
      load_matrices(b[j], stage.b + swizzled(warp_column + j * 2 * kMmaColumns + lane % 16, chunk));
    }
#pragma unroll
    for (int i = 0; i < kRowSteps; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnSteps; ++j)
        multiply(c[i][j], a[i], b[j / 2][j % 2], b[j / 2][j % 2 + 2]);
    }
  }
}

// The tile of C at (row, column), summed over stages `first` to `last` of k, in storage.c. Every
// thread may read all of it.
__device__ void make_tile(Storage& storage, const Problem& p, int row, int column, int first,
                          int last) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 2 * kWarpTile, warp_column = warp % 2 * kWarpTile;
  const auto copy = [&](int step) {
    if (step < last) {
      Stage& stage = storage.stages[(step - first) % kStages];
      copy_operand(stage.a, p.a, p.m, p.k, row, step * kDepth);
      copy_operand(stage.b, p.b, p.n, p.k, column, step * kDepth);
    }
    // An empty group too: the waits count groups.
    commit_copies();
  };
#pragma unroll 1
  for (int step = first; step < first + kStages - 1; ++step) copy(step);
  Accumulators c = {};
#pragma unroll 1
  for (int step = first; step < last; ++step) {
    wait_for_copies<kStages - 2>();
    // All threads' parts of this stage are there, and nobody reads the stage that is filled next
    // any more.
    __syncthreads();
    copy(step + kStages - 1);
    multiply_stage(c, storage.stages[(step - first) % kStages], warp_row, warp_column);
  }
  // No copy is under way: the last groups are empty. The tile lies where the stages were.
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRowSteps; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnSteps; ++j) {
      float* to = storage.c + (warp_row + i * kMmaRows + lane / 4) * kPitch + warp_column +
                  j * kMmaColumns + lane % 4 * 2;
      to[0] = c[i][j][0];
      to[1] = c[i][j][1];
      to[8 * kPitch] = c[i][j][2];
      to[8 * kPitch + 1] = c[i][j][3];
    }
  }
  __syncthreads();
}

__device__ void store(float* to, float value) {
  *to = value;
}
__device__ void store(Element* to, float value) {
  *to = __float2bfloat16(value);
}

// A block makes every gridDim.x-th tile.
template <class Output>
__device__ void gemm(const Problem& p, Output* c) {
  __shared__ __align__(128) Storage storage;
  const int columns = (p.n + kTile - 1) / kTile, tiles = (p.m + kTile - 1) / kTile * columns;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int row = tile / columns * kTile, column = tile % columns * kTile;
    make_tile(storage, p, row, column, 0, (p.k + kDepth - 1) / kDepth);
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int r = i / kTile, s = i % kTile;
      if (row + r < p.m && column + s < p.n) {
        store(c + static_cast<int64_t>(row + r) * p.n + column + s, storage.c[r * kPitch + s]);
      }
    }
    __syncthreads();  // the next tile's stages lie where this tile was read
  }
}

}  // namespace

extern "C" {

// grid: any number of blocks; kThreads threads.
__global__ void __launch_bounds__(kThreads)
    tiled_gemm_f32(const Element* a, const Element* b, float* c, int m, int n, int k) {
  gemm({a, b, m, n, k}, c);
}

__global__ void __launch_bounds__(kThreads)
    tiled_gemm_bf16(const Element* a, const Element* b, Element* c, int m, int n, int k) {
  gemm({a, b, m, n, k}, c);
}

// k is split among gridDim.y slices; grid: (tiles of C, slices). Each writes its sums to the
// workspace, and the block that comes last to a tile adds them, in the slices' order, so that the
// result does not depend on who was last. workspace: tiles × slices × 64×64 floats. tickets: a zero
// for each tile, and zero again afterwards.
__global__ void __launch_bounds__(kThreads)
    split_k_gemm(const Element* a, const Element* b, float* c, int m, int n, int k,
                 float* workspace, unsigned* tickets) {
  __shared__ __align__(128) Storage storage;
  __shared__ bool is_last;
  const int columns = (n + kTile - 1) / kTile, tile = blockIdx.x, slices = gridDim.y,
            slice = blockIdx.y;
  const int row = tile / columns * kTile, column = tile % columns * kTile;
  const int steps = (k + kDepth - 1) / kDepth;
  make_tile(storage, {a, b, m, n, k}, row, column, steps * slice / slices,
            steps * (slice + 1) / slices);
  float* partials = workspace + static_cast<int64_t>(tile) * slices * kTile * kTile;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    partials[slice * kTile * kTile + i] = storage.c[i / kTile * kPitch + i % kTile];
  }
  // Every thread's sums are visible to other blocks before this block's ticket is drawn.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(tickets + tile, 1u) == static_cast<unsigned>(slices) - 1;
    // The other blocks' sums, which were written before their tickets, are visible to what follows.
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int r = i / kTile, s = i % kTile;
    if (row + r >= m || column + s >= n) continue;
    float sum = 0;
    for (int other = 0; other < slices; ++other) sum += partials[other * kTile * kTile + i];
    c[static_cast<int64_t>(row + r) * n + column + s] = sum;
  }
  if (threadIdx.x == 0) tickets[tile] = 0;
}
}
