// The one argument of every GEMM launcher here.
#pragma once

#include <cuda_runtime_api.h>

// D = alpha A B + beta C, with A m×k, B k×n, C and D m×n in device memory. A leading dimension
// counts the elements from one row to the next (row-major) or from one column to the next
// (column-major). C and D are row-major. Multiples of the launcher's alignment, in elements: every
// pointer, every leading dimension, and each operand's extent along its contiguous dimension.
struct GemmCall {
  int m, n, k;
  int lda, ldb, ldc, ldd;
  float alpha, beta;
  const void* a;
  const void* b;
  const void* c;  // read only if beta is not 0, yet always a valid matrix: d will do
  void* d;
  int slices;       // parts that k is split into: 1 unless the launcher splits k
  void* workspace;  // of the size that <launcher>_workspace returns, null where there is none
  cudaStream_t stream;
};
