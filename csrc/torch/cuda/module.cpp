#include "torch/cuda/module.h"

#include <c10/core/DeviceGuard.h>

#include <string>
#include <tuple>
#include <utility>

#include "torch/cuda/choice.h"
#include "torch/cuda/device.h"
#include "torch/cuda/explain.h"
#include "torch/cuda/operands.h"

namespace fused_lora::cuda {
namespace {

namespace py = pybind11;

// decide(device, shape, presumed_faster, time) -> "fused" or "composed". time() -> (fused,
// composed) in milliseconds, or None where memory does not suffice; None in its place where nothing
// can be timed.
void set_python_policy(py::function decide) {
  // Never destroyed: a call may come until the interpreter is gone.
  auto* const kept = new py::function(std::move(decide));
  set_policy([kept](const ShapeClass& shape, Candidate& call) {
    const py::gil_scoped_acquire gil;
    const auto time = [&call]() -> std::optional<std::pair<double, double>> {
      const py::gil_scoped_release no_gil;
      const std::optional<Times> times = call.time();
      if (!times) return std::nullopt;
      return std::pair(times->fused, times->composed);
    };
    const py::object timer = call.capturing() ? py::object(py::none()) : py::cpp_function(time);
    const bool fast = call.presumed_faster();
    const auto path = (*kept)(shape.device, shape.text(), fast, timer).cast<std::string>();
    return path == "fused" ? Path::kFused : Path::kComposed;
  });
}

py::dict explain_shape(int64_t rows, int64_t in_features, int64_t out_features, int64_t rank,
                       at::ScalarType dtype, at::ScalarType adapter_dtype, bool round_adapters,
                       bool bias, bool dropout, bool weight_transposed,
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
  m.def("set_policy", &set_python_policy, py::arg("decide"),
        "Set who chooses between the fused and the composed path on CUDA.");
  m.def("forget_choices", &forget_choices, py::call_guard<py::gil_scoped_release>(),
        "Let every choice be made again.");
  m.def("device_figures", &device_figures, py::arg("index"),
        "A GPU's compute capability, multiprocessors and shared memory, as plans see them.");
  m.def("explain_shape", &explain_shape, py::arg("rows"), py::arg("in_features"),
        py::arg("out_features"), py::arg("rank"), py::arg("dtype"), py::arg("adapter_dtype"),
        py::arg("round_adapters"), py::arg("bias"), py::arg("dropout"),
        py::arg("weight_transposed"), py::arg("figures"),
        "For forward and backward: the shape's class, the plan, and whether it is presumed faster "
        "than composed.");
}

}  // namespace fused_lora::cuda
