#include "runtime/launch_shape.h"

#include <string>

#include "runtime/errors.h"

namespace emulator {

LaunchShape shape_of(dim3 grid, dim3 block) {
  LaunchShape shape;
  shape.grid[0] = grid.x, shape.grid[1] = grid.y, shape.grid[2] = grid.z;
  shape.block[0] = block.x, shape.block[1] = block.y, shape.block[2] = block.z;
  return shape;
}

LaunchShape shape_of(const cudaLaunchConfig_t& config) {
  LaunchShape shape = shape_of(config.gridDim, config.blockDim);
  if (config.numAttrs > 0 && config.attrs == nullptr) throw ArgumentError("config->attrs is null");
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    switch (attribute.id) {
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributeAccessPolicyWindow:
      case cudaLaunchAttributeClusterSchedulingPolicyPreference:
      case cudaLaunchAttributeProgrammaticStreamSerialization:
      case cudaLaunchAttributePriority:
      case cudaLaunchAttributePreferredSharedMemoryCarveout:
        break;
      case cudaLaunchAttributeClusterDimension: {
        const auto& cluster = attribute.val.clusterDim;
        const uint32_t extents[3] = {cluster.x, cluster.y, cluster.z};
        for (int axis = 0; axis < 3; ++axis) {
          if (extents[axis] == 0 || shape.grid[axis] % extents[axis] != 0) {
            throw CudaError(cudaErrorInvalidClusterSize,
                            "the cluster's extent " + std::to_string(extents[axis]) +
                                " does not divide the grid's, " + std::to_string(shape.grid[axis]));
          }
          shape.cluster[axis] = extents[axis];
        }
        break;
      }
      default:
        throw CudaError(cudaErrorNotSupported,
                        "launch attribute " + std::to_string(attribute.id) + " is not emulated");
    }
  }
  return shape;
}

}  // namespace emulator
