// Small kernels, each with one property that a check or a counter must see. Where a kernel takes a
// flag, the same instructions run with and without the bug.
#include <cstdint>
#include <cuda/atomic>

struct Table {
  int values[4];
};

extern __shared__ int dynamic_tile[];

extern "C" {

// ---- memory
// --------------------------------------------------------------------------------------

__global__ void read_at(const float* in, float* out, long long index) {
  out[threadIdx.x] = in[index + threadIdx.x];
}

__global__ void write_at(float* out, long long index) {
  out[index + threadIdx.x] = 1;
}

// out[row] = Σ in[row, column] over `columns`; a term beyond `used` counts zero times.
__global__ void row_sums(const float* in, float* out, int stride, int columns, int used) {
  float sum = 0;
  for (int c = 0; c < columns; ++c) {
    sum += in[threadIdx.x * stride + c] * (c < used ? 1.0f : 0.0f);
  }
  out[threadIdx.x] = sum;
}

__global__ void static_shared_at(int* out, int index) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = tile[index + threadIdx.x];
}

__global__ void dynamic_shared_at(int* out, int index) {
  dynamic_tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = dynamic_tile[index + threadIdx.x];
}

__global__ void local_at(int* out, int filled, int index) {
  int values[8];
#pragma unroll 1
  for (int i = 0; i < filled; ++i) values[i] = i;
  out[threadIdx.x] = values[index];
}

__global__ void parameter_at(const __grid_constant__ Table table, int* out, int index) {
  out[threadIdx.x] = table.values[index];
}

__global__ void read_vector_at(const float* in, float4* out, int index) {
  out[0] = *reinterpret_cast<const float4*>(in + index);
}

// Unsigned, where overflow is defined: the compiler would otherwise widen the product by itself.
__global__ void narrow_index(float* out, unsigned row, unsigned stride) {
  out[static_cast<int>(row * stride)] = 1;
}

__global__ void wide_index(float* out, int row, int stride) {
  out[static_cast<long long>(row) * stride] = 1;
}

// ---- races in shared memory
// ----------------------------------------------------------------------

// The other half of the block reads what this half wrote.
__global__ void exchange_halves(int* out, int synchronised) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  if (synchronised) __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

__global__ void exchange_lanes(int* out, int synchronised) {
  __shared__ volatile int tile[32];
  tile[threadIdx.x] = threadIdx.x;
  if (synchronised) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void write_after_read(int* out, int synchronised) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int theirs = tile[threadIdx.x ^ 32];
  if (synchronised) __syncthreads();
  tile[threadIdx.x] = -1;
  __syncthreads();
  out[threadIdx.x] = theirs + tile[threadIdx.x];
}

__global__ void write_after_write(int* out, int synchronised) {
  __shared__ int tile[32];
  if (threadIdx.x < 32) tile[threadIdx.x] = threadIdx.x;
  if (synchronised) __syncthreads();
  if (threadIdx.x >= 32) tile[threadIdx.x - 32] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x % 32];
}

// Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2; `reach` says whose data is read.
__global__ void named_barriers(int* out, int reach) {
  __shared__ int tile[128];
  tile[threadIdx.x] = threadIdx.x;
  const int pair = threadIdx.x / 64;
  asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory");
  out[threadIdx.x] = tile[threadIdx.x ^ reach];
}

// Warp 0 produces and does not wait; warp 1 waits for it.
__global__ void arrive_and_wait(int* out) {
  __shared__ int tile[32];
  if (threadIdx.x < 32) {
    tile[threadIdx.x] = threadIdx.x;
    asm volatile("bar.arrive 1, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 64;" ::: "memory");
    out[threadIdx.x - 32] = tile[threadIdx.x - 32];
  }
}

__global__ void shared_atomics(int* out) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, 1);
  __syncthreads();
  if (threadIdx.x == 0) *out = total;
}

// All lanes of one instruction store `value`, or each its own number.
__global__ void same_place(int* out, int value, int differ) {
  __shared__ int place;
  place = differ ? static_cast<int>(threadIdx.x) : value;
  __syncthreads();
  out[threadIdx.x] = place;
}

// ---- cp.async
// ------------------------------------------------------------------------------------

__device__ void copy_async(int* to, const int* from) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}

// 0: right; 1: no wait; 2: a group may still be under way; 3: no __syncthreads after the wait.
__global__ void copy_and_read(const int* in, int* out, int bug) {
  __shared__ int tile[64];
  copy_async(&tile[threadIdx.x], &in[threadIdx.x]);
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (bug == 0 || bug == 3) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (bug == 2) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (bug != 3) __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

// A single stage is filled again while the other warp may still read it.
__global__ void refill_stage(const int* in, int* out, int synchronised) {
  __shared__ int tile[64];
  int sum = 0;
#pragma unroll 1
  for (int k = 0; k < 3; ++k) {
    copy_async(&tile[threadIdx.x], &in[64 * k + threadIdx.x]);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    sum += tile[threadIdx.x ^ 32];
    if (synchronised) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// ---- races between blocks
// ------------------------------------------------------------------------

__global__ void write_one_place(int* out) {
  if (threadIdx.x == 0) *out = blockIdx.x;
}

__global__ void read_neighbour(int* data, int* out) {
  data[blockIdx.x] = blockIdx.x;
  out[blockIdx.x] = data[blockIdx.x ^ 1];
}

// out = Σ partial, by the block that comes last. fence: 0 none, 1 of the block, 2 of the device.
__global__ void last_block_sum(int* partial, unsigned* counter, int* out, int fence) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = blockIdx.x + 1;
  if (fence == 1) __threadfence_block();
  if (fence == 2) __threadfence();
  if (atomicAdd(counter, 1u) != gridDim.x - 1) return;
  if (fence == 1) __threadfence_block();
  if (fence == 2) __threadfence();
  int sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += partial[i];
  *out = sum;
}

__global__ void last_block_sum_by_atomic_ref(int* partial, unsigned* counter, int* out,
                                             int ordered) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = blockIdx.x + 1;
  cuda::atomic_ref<unsigned, cuda::thread_scope_device> arrivals(*counter);
  const unsigned before = ordered ? arrivals.fetch_add(1, cuda::memory_order_acq_rel)
                                  : arrivals.fetch_add(1, cuda::memory_order_relaxed);
  if (before != gridDim.x - 1) return;
  int sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += partial[i];
  *out = sum;
}

__global__ void spin_lock(int* lock, int* total) {
  if (threadIdx.x != 0) return;
  while (atomicCAS(lock, 0, 1) != 0) {
  }
  __threadfence();
  *total += 1;
  __threadfence();
  atomicExch(lock, 0);
}

// Block `first` hands a value to the other one.
__global__ void hand_over(int* flag, int* data, int* out, int first) {
  cuda::atomic_ref<int, cuda::thread_scope_device> ready(*flag);
  if (blockIdx.x == first) {
    *data = 42;
    ready.store(1, cuda::memory_order_release);
  } else {
    while (ready.load(cuda::memory_order_acquire) == 0) {
    }
    *out = *data;
  }
}

// ---- barriers
// ------------------------------------------------------------------------------------

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16) {
    asm volatile("bar.sync 0;" ::: "memory");
    out[threadIdx.x] = 1;
  } else {
    asm volatile("bar.sync 0;" ::: "memory");
    out[threadIdx.x] = 2;
  }
}

__global__ void two_barriers(int* out) {
  const int number = threadIdx.x / 32 + 1;
  asm volatile("bar.sync %0, 64;" ::"r"(number) : "memory");
  out[threadIdx.x] = number;
}

__global__ void counted_barrier(int* out, int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
  out[threadIdx.x] = 1;
}

__global__ void exited_threads(int* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void spin_forever(volatile int* flag) {
  while (*flag == 0) {
  }
}

__global__ void shuffle_by(int* out, unsigned mask, int lanes) {
  int value = threadIdx.x;
  if (threadIdx.x < lanes) value = __shfl_xor_sync(mask, value, 1);
  out[threadIdx.x] = value;
}

// ---- counters
// ------------------------------------------------------------------------------------

__global__ void copy_strided(const float* in, float* out, int stride, int offset) {
  out[threadIdx.x] = in[threadIdx.x * stride + offset];
}

__global__ void shared_strided(int* out, int stride) {
  dynamic_tile[threadIdx.x * stride] = threadIdx.x;
  out[threadIdx.x] = dynamic_tile[threadIdx.x * stride];
}

__global__ void shared_broadcast(int* out) {
  dynamic_tile[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = dynamic_tile[7];
}

__global__ void shared_vectors(int4* out) {
  int4* tile = reinterpret_cast<int4*>(dynamic_tile);
  tile[threadIdx.x] = make_int4(threadIdx.x, 1, 2, 3);
  out[threadIdx.x] = tile[threadIdx.x];
}

// A 32 × 32 tile is written by rows and read by columns; `pitch` is a row's length in words.
__global__ void transpose(const int* in, int* out, int pitch) {
  const int row = threadIdx.x / 32, column = threadIdx.x % 32;
  dynamic_tile[row * pitch + column] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = dynamic_tile[column * pitch + row];
}

// Rows of 128 bytes: eight chunks of 16, permuted by the row's number when `swizzled`.
__global__ void load_matrices(int* out, int swizzled) {
  for (int i = threadIdx.x; i < 32 * 32; i += 32) dynamic_tile[i] = i;
  __syncwarp();
  const int row = threadIdx.x, chunk = swizzled ? row % 8 : 0;
  const auto address =
      static_cast<unsigned>(__cvta_generic_to_shared(dynamic_tile + 32 * row + 4 * chunk));
  int a, b, c, d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
  out[threadIdx.x] = a + b + c + d;
}
}
