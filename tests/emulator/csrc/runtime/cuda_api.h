// The CUDA headers' prototypes, and those of the calls that nvcc puts into the host code of a
// kernel.
#pragma once

// The headers leave the visibility open, and launchers must find these functions in the library.
#pragma GCC visibility push(default)

#include <cuda.h>
#include <cuda_runtime_api.h>

// As crt/host_runtime.h and crt/device_functions.h declare them, which only nvcc can include.
extern "C" {
void** __cudaRegisterFatBinary(void* wrapper);
void __cudaRegisterFatBinaryEnd(void** module);
void __cudaUnregisterFatBinary(void** module);
char __cudaInitModule(void** module);
void __cudaRegisterFunction(void** module, const char* host_function, char* device_function,
                            const char* name, int thread_limit, uint3* thread, uint3* block,
                            dim3* block_shape, dim3* grid_shape, int* warp_size);
void __cudaRegisterVar(void** module, char* host_variable, char* device_variable, const char* name,
                       int external, size_t bytes, int constant, int global);
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function);
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic_shared,
                                     CUstream_st* stream);
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic_shared,
                                       void* stream);
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t dynamic_shared, cudaStream_t stream);
}

#pragma GCC visibility pop
