// The shape of a launch, and those of its attributes (cudaLaunchAttribute) that are emulated.
#pragma once

#include "runtime/cuda_api.h"
#include "runtime/machine.h"

namespace emulator {

LaunchShape shape_of(dim3 grid, dim3 block);

// The grid, the block and the cluster. Hints for caches, priorities and scheduling, and
// programmatic stream serialisation, change nothing: a launch begins when the one before it has
// ended, which is one of the orders that they allow. Throws CudaError(cudaErrorNotSupported) for
// any other attribute, cudaErrorInvalidClusterSize for a cluster that does not divide the grid,
// ArgumentError for a missing list.
LaunchShape shape_of(const cudaLaunchConfig_t& config);

}  // namespace emulator
