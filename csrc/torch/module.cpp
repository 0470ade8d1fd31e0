// fused_lora._C: the op without the cost of torch.ops' Python layers, and what this binary was
// built of.
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "build_facts.h"
#include "torch/any_base/ops.h"
#include "torch/cast_cache.h"
#include "torch/cpu/module.h"
#include "torch/mixed_batch/ops.h"
#include "torch/ops.h"
#include "torch/path.h"
#include "torch/policy.h"
#ifdef FUSED_LORA_CUDA
#include "torch/cuda/module.h"
#endif

namespace {

void set_path(const std::string& name) {
  using fused_lora::Path;
  const bool forced = name == "fused" || name == "composed";
  fused_lora::ask_for(!forced ? Path::kAuto : name == "fused" ? Path::kFused : Path::kComposed);
}

using Tensors = std::vector<at::Tensor>;
using fused_lora::ops::OptionalTensor;

at::Tensor lora_linear_mixed(const at::Tensor& x, const at::Tensor& weight, const Tensors& lora_a,
                             const Tensors& lora_b, const at::Tensor& adapter_index,
                             const OptionalTensor& bias, const std::vector<double>& scaling,
                             double dropout_p, const OptionalTensor& seed, bool round_adapters) {
  return fused_lora::ops::lora_linear_mixed(x, weight, lora_a, lora_b, adapter_index, bias, scaling,
                                            dropout_p, seed, round_adapters);
}

std::vector<at::Tensor> lora_linear_grouped(
    const at::Tensor& x, const std::vector<at::Tensor>& weights,
    const std::vector<at::Tensor>& lora_a, const std::vector<at::Tensor>& lora_b,
    const std::vector<std::optional<at::Tensor>>& biases, const std::vector<double>& scalings,
    const std::vector<double>& dropout_p, const std::vector<std::optional<at::Tensor>>& seeds,
    bool round_adapters) {
  using fused_lora::ops::OptionalTensors;
  return fused_lora::ops::lora_linear_grouped(x, weights, lora_a, lora_b, OptionalTensors(biases),
                                              scalings, dropout_p, OptionalTensors(seeds),
                                              round_adapters);
}

// Returns nothing: the caller has base.
void lora_add_(at::Tensor base, const at::Tensor& x, const at::Tensor& lora_a,
               const at::Tensor& lora_b, double scaling, double dropout_p,
               const OptionalTensor& seed, bool round_adapters, int64_t column_offset) {
  fused_lora::ops::lora_add_(base, x, lora_a, lora_b, scaling, dropout_p, seed, round_adapters,
                             column_offset);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "The compiled half of fused_lora. Importing it registers torch.ops.fused_lora.*";

  m.def("lora_linear", &fused_lora::ops::lora_linear, py::arg("x"), py::arg("weight"),
        py::arg("lora_a"), py::arg("lora_b"), py::arg("bias"), py::arg("scaling"),
        py::arg("dropout_p"), py::arg("seed"), py::arg("round_adapters"),
        py::arg("column_offset") = 0, py::call_guard<py::gil_scoped_release>(),
        "torch.ops.fused_lora.lora_linear, differentiable, called directly.");
  m.def("lora_linear_mixed", &lora_linear_mixed, py::arg("x"), py::arg("weight"), py::arg("lora_a"),
        py::arg("lora_b"), py::arg("adapter_index"), py::arg("bias"), py::arg("scaling"),
        py::arg("dropout_p"), py::arg("seed"), py::arg("round_adapters"),
        py::call_guard<py::gil_scoped_release>(),
        "torch.ops.fused_lora.lora_linear_mixed, differentiable, called directly.");
  m.def("lora_linear_grouped", &lora_linear_grouped, py::arg("x"), py::arg("weights"),
        py::arg("lora_a"), py::arg("lora_b"), py::arg("biases"), py::arg("scalings"),
        py::arg("dropout_p"), py::arg("seeds"), py::arg("round_adapters"),
        py::call_guard<py::gil_scoped_release>(),
        "torch.ops.fused_lora.lora_linear_grouped, differentiable, called directly.");
  const auto add = [&m](const char* name, auto op, const char* doc) {
    m.def(name, op, py::arg("base"), py::arg("x"), py::arg("lora_a"), py::arg("lora_b"),
          py::arg("scaling"), py::arg("dropout_p"), py::arg("seed"), py::arg("round_adapters"),
          py::arg("column_offset") = 0, py::call_guard<py::gil_scoped_release>(), doc);
  };
  add("lora_add", &fused_lora::ops::lora_add,
      "torch.ops.fused_lora.lora_add, differentiable, called directly.");
  add("lora_add_", &lora_add_, "torch.ops.fused_lora.lora_add_, differentiable, called directly.");
  m.def("as_no_view", &fused_lora::ops::as_no_view, py::arg("view"),
        py::call_guard<py::gil_scoped_release>(),
        "A view's memory as a tensor that is no view, so that lora_add_ may write it.");
  m.def("clear_cast_cache", &fused_lora::cast_cache::clear,
        py::call_guard<py::gil_scoped_release>(),
        "Drop the low-precision copies of frozen weights that autocast calls keep.");
  m.def(
      "set_path", &set_path, py::arg("name"),
      "Make \"fused\" or \"composed\" the path of every thread's calls; any other name lets the op "
      "choose.");
  m.def(
      "build_facts",
      [] { return std::unordered_map<std::string, std::string>{FUSED_LORA_BUILD_FACTS}; },
      "What this binary was built of, as {name: value}.");
  fused_lora::add_policy_to(m);
  fused_lora::cpu::add_to(m);
#ifdef FUSED_LORA_CUDA
  fused_lora::cuda::add_to(m);
#endif
}
