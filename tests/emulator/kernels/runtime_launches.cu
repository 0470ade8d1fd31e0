// Kernels and the host code that launches them. A launcher returns the code that the runtime gave;
// a ..._function returns the host function by which the runtime knows the kernel.
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

struct Scale {
  float* out;
  const float* in;
  float factor;
  int count;
};

__constant__ float coefficients[4];
__device__ int multiplier = 3;
extern __shared__ float tile[];

// out[i] = factor · in[i]
__global__ void scale(Scale p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.count) p.out[i] = p.factor * p.in[i];
}

// Parameters of every width, so that each lies behind padding.
__global__ void widths(char a, double b, short c, double* out, long long d, Scale e) {
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
  out[4] = e.factor;
  out[5] = e.count;
}

// out[i] = multiplier · Σₖ coefficients[k] · iᵏ
__global__ void polynomial(float* out) {
  const float x = threadIdx.x;
  float sum = 0;
  for (int k = 3; k >= 0; --k) sum = sum * x + coefficients[k];
  out[threadIdx.x] = multiplier * sum;
}

// Turns a row around through dynamic shared memory of count floats.
__global__ void reverse(float* row, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) tile[i] = row[i];
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) row[i] = tile[count - 1 - i];
}

__global__ void __launch_bounds__(64) bounded(int* out) {
  out[threadIdx.x] = threadIdx.x;
}

// 96 values want to be in registers at once. Registers go to warps in units of 256, and 100 for
// each thread are no multiple of it; a block of 1024 threads would need more than an SM has.
__global__ void __maxnreg__(100) hungry(float* values) {
  float kept[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) kept[i] = values[i * blockDim.x + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i * blockDim.x + threadIdx.x] = kept[95 - i] * kept[i / 2];
}

// 16 KiB of static shared memory.
__global__ void static_shared(float* out) {
  __shared__ float values[4096];
  for (int i = threadIdx.x; i < 4096; i += blockDim.x) values[i] = i;
  __syncthreads();
  out[threadIdx.x] = values[4095 - threadIdx.x];
}

// Blocks write to the same place without an order.
__global__ void race(int* out) {
  *out = blockIdx.x;
}

__global__ void hang(volatile int* flag) {
  while (*flag == 0) {
  }
}

__global__ void trap() {
  __trap();
}

__global__ void fail_assertion(int value) {
  assert(value == 0);
}

// A video instruction, which the emulator does not know.
__global__ void unknown_instruction(int* out) {
  int sum;
  asm("vadd.s32.s32.s32 %0, %1, %2;" : "=r"(sum) : "r"(out[0]), "r"(out[1]));
  *out = sum;
}

extern "C" {

#define FUNCTION(kernel)                          \
  const void* kernel##_function() {               \
    return reinterpret_cast<const void*>(kernel); \
  }
FUNCTION(scale)
FUNCTION(reverse)
FUNCTION(bounded)
FUNCTION(hungry)
FUNCTION(static_shared)
FUNCTION(trap)
#undef FUNCTION

cudaError_t launch_scale(const Scale* p, int threads, cudaStream_t stream) {
  scale<<<(p->count + threads - 1) / threads, threads, 0, stream>>>(*p);
  return cudaGetLastError();
}

cudaError_t launch_widths(double* out, float factor, int count) {
  char a = -7;
  double b = 0.125;
  short c = -300;
  long long d = -(1ll << 40);
  Scale e{nullptr, nullptr, factor, count};
  void* arguments[] = {&a, &b, &c, &out, &d, &e};
  return cudaLaunchKernel(reinterpret_cast<const void*>(widths), 1, 1, arguments, 0, nullptr);
}

cudaError_t set_coefficients(const float* values, size_t count, size_t offset) {
  return cudaMemcpyToSymbol(coefficients, values, count, offset);
}

cudaError_t get_coefficients(float* values, size_t count, size_t offset) {
  return cudaMemcpyFromSymbol(values, coefficients, count, offset);
}

cudaError_t multiplier_address(int** address, size_t* bytes) {
  const cudaError_t error = cudaGetSymbolSize(bytes, multiplier);
  if (error != cudaSuccess) return error;
  return cudaGetSymbolAddress(reinterpret_cast<void**>(address), multiplier);
}

cudaError_t launch_polynomial(float* out, int threads) {
  polynomial<<<1, threads>>>(out);
  return cudaGetLastError();
}

cudaError_t launch_reverse(float* row, int count) {
  reverse<<<1, 256, count * sizeof(float)>>>(row, count);
  return cudaGetLastError();
}

// By cudaLaunchKernelExC, with programmatic stream serialisation and a cluster.
cudaError_t launch_bounded(int* out, int threads, int cluster) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = 2;
  config.blockDim = threads;
  config.attrs = attributes;
  config.numAttrs = 2;
  void* arguments[] = {&out};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(bounded), arguments);
}

cudaError_t launch_cooperative(int* out) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 32;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {&out};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(bounded), arguments);
}

cudaError_t launch_hungry(float* values, int threads) {
  hungry<<<1, threads>>>(values);
  return cudaGetLastError();
}

cudaError_t launch_static_shared(float* out, size_t dynamic_bytes) {
  static_shared<<<1, 32, dynamic_bytes>>>(out);
  return cudaGetLastError();
}

cudaError_t launch_race(int* out) {
  race<<<2, 1>>>(out);
  return cudaGetLastError();
}

cudaError_t launch_hang(int* flag) {
  hang<<<1, 1>>>(flag);
  return cudaGetLastError();
}

cudaError_t launch_trap() {
  trap<<<1, 1>>>();
  return cudaGetLastError();
}

cudaError_t launch_fail_assertion() {
  fail_assertion<<<1, 1>>>(1);
  return cudaGetLastError();
}

cudaError_t launch_unknown_instruction(int* out) {
  unknown_instruction<<<1, 1>>>(out);
  return cudaGetLastError();
}

// A graph of a memset, values ← 2 · in, values ← 3 · values, copy ← values, which is launched
// `times` times.
cudaError_t capture(float* values, const float* in, float* copy, int count, int times,
                    size_t* nodes) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  const size_t bytes = count * sizeof(float);
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  cudaMemsetAsync(values, 0xFF, bytes, stream);
  Scale p{values, in, 2.0f, count};
  scale<<<1, count, 0, stream>>>(p);
  p = {values, values, 3.0f, count};
  scale<<<1, count, 0, stream>>>(p);
  cudaMemcpyAsync(copy, values, bytes, cudaMemcpyDeviceToDevice, stream);
  p.factor = 1000.0f;  // too late: the launch holds a copy
  cudaStreamEndCapture(stream, &graph);
  cudaGraphGetNodes(graph, nullptr, nodes);
  cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  for (int i = 0; i < times; ++i) cudaGraphLaunch(executable, stream);
  cudaStreamSynchronize(stream);
  cudaGraphExecDestroy(executable);
  cudaStreamDestroy(stream);
  return cudaGetLastError();
}
}
