// mbarriers and bulk copies of sm_90a; `bug` picks what is wrong, 0 nothing.
#include <cstdint>

namespace {

__device__ unsigned address_of(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

__device__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(count)
               : "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}

__device__ void wait(uint64_t* barrier, int parity) {
  int done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, "
        "p;\n}"
        : "=r"(done)
        : "r"(address_of(barrier)), "r"(parity)
        : "memory");
  }
}

}  // namespace

extern "C" {

// Every thread arrives, and reads what another one wrote. The barrier expects `count` arrivals.
__global__ void arrivals(int* out, int count, int parity, int initialised) {
  __shared__ uint64_t barrier;
  __shared__ int tile[64];
  if (threadIdx.x == 0 && initialised) init(&barrier, count);
  __syncthreads();
  tile[threadIdx.x] = threadIdx.x;
  arrive(&barrier);
  wait(&barrier, parity);
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

// Three arrivals at a barrier of two.
__global__ void surplus(int* out) {
  __shared__ uint64_t barrier;
  init(&barrier, 2);
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], 3;" ::"r"(address_of(&barrier)) : "memory");
  *out = 1;
}

// 1: no fence.mbarrier_init; 2: fewer bytes expected; 3: more; 4: no wait.
__global__ void bulk_load(const int* in, int* out, int bug) {
  __shared__ alignas(16) int tile[32];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    init(&barrier, 1);
    if (bug != 1) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const int bytes = bug == 2 ? 64 : bug == 3 ? 256 : 128;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address_of(&barrier)),
                 "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 128, "
        "[%2];" ::"r"(address_of(tile)),
        "l"(in), "r"(address_of(&barrier))
        : "memory");
  }
  __syncthreads();
  if (bug != 4) wait(&barrier, 0);
  out[threadIdx.x] = tile[threadIdx.x];
}

// 1: no fence.proxy.async between the stores and the bulk store; 2: the block ends without a wait.
__global__ void bulk_store(int* out, int bug) {
  __shared__ alignas(16) int tile[32];
  tile[threadIdx.x] = threadIdx.x;
  if (bug != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;" ::"l"(out),
                 "r"(address_of(tile))
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (bug != 2) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
}
