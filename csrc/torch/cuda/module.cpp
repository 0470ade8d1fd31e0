#include "torch/cuda/module.h"

#include <c10/core/DeviceGuard.h>

#include <tuple>

#include "torch/cuda/device.h"
#include "torch/cuda/explain.h"
#include "torch/cuda/operands.h"

namespace fused_lora::cuda {
namespace {

namespace py = pybind11;

py::dict explain_shape(int64_t rows, int64_t in_features, int64_t out_features, int64_t rank,
                       at::ScalarType dtype, at::ScalarType adapter_dtype, bool round_adapters,
                       bool bias, bool dropout, bool weight_transposed, bool adapter_alone,
                       const std::tuple<int, int, int>& figures) {
  Example example;
  kernels::Problem& p = example.problem;
  p.rows = rows;
  p.in_features = in_features;
  p.out_features = out_features;
  p.rank = rank;
  p.dtype = kernel_dtype(dtype);
  p.adapter_dtype = kernel_dtype(adapter_dtype);
  p.round_adapters = round_adapters && p.dtype != p.adapter_dtype;
  p.allow_tf32 = p.dtype == kernels::DType::kFloat32 && allows_tf32();
  example.bias = bias;
  example.dropout = dropout;
  example.weight_transposed = weight_transposed;
  example.adapter_alone = adapter_alone;
  kernels::Device device;
  std::tie(device.compute_capability, device.multiprocessors, device.shared_memory_per_block) =
      figures;
  const Explanation e = explain(example, device);
  return py::dict(
      py::arg("forward") = std::tuple(e.forward_class, e.forward, e.forward_presumed_faster),
      py::arg("backward") = std::tuple(e.backward_class, e.backward, e.backward_presumed_faster));
}

// (compute capability, multiprocessors, shared memory of a block). Throws where this build has no
// kernels for the device.
std::tuple<int, int, int> device_figures(int index) {
  const c10::Device device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
  const c10::DeviceGuard guard(device);
  const kernels::Device& found = figures(device);
  return {found.compute_capability, found.multiprocessors, found.shared_memory_per_block};
}

}  // namespace

void add_to(py::module_& m) {
  m.def("device_figures", &device_figures, py::arg("index"),
        "A GPU's compute capability, multiprocessors and shared memory, as plans see them.");
  m.def("explain_shape", &explain_shape, py::arg("rows"), py::arg("in_features"),
        py::arg("out_features"), py::arg("rank"), py::arg("dtype"), py::arg("adapter_dtype"),
        py::arg("round_adapters"), py::arg("bias"), py::arg("dropout"),
        py::arg("weight_transposed"), py::arg("adapter_alone"), py::arg("figures"),
        "For forward and backward: the shape's class, the plan, and whether it is presumed faster "
        "than composed.");
}

}  // namespace fused_lora::cuda
