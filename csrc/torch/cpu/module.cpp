#include "torch/cpu/module.h"

#include <string>
#include <tuple>

#include "torch/cpu/backend.h"
#include "torch/cpu/level.h"

namespace fused_lora::cpu {
namespace {

namespace py = pybind11;

// The classes of calls with dense operands, what a layer hands over as a rule: (forward, backward),
// each (class, whether presumed faster).
py::dict explain_shape(int64_t rows, int64_t in_features, int64_t out_features, int64_t rank,
                       bool bfloat16, bool masters, bool round_adapters, bool bias, bool dropout,
                       bool weight_transposed, int threads) {
  // Classes look at addresses for their alignment alone. Torch's allocator gives such as this one.
  static char aligned[1] __attribute__((aligned(64)));
  const auto dense = [&](int64_t columns) { return fused::MatrixView{aligned, columns, 1}; };
  fused::Problem p;
  p.rows = rows;
  p.in_features = in_features;
  p.out_features = out_features;
  p.rank = rank;
  p.dtype = bfloat16 ? fused::DType::kBFloat16 : fused::DType::kFloat32;
  p.adapter_dtype = masters ? fused::DType::kFloat32 : p.dtype;
  p.round_adapters = round_adapters && p.dtype != p.adapter_dtype;
  fused::ForwardCall forward;
  fused::BackwardCall backward;
  const auto describe = [&](auto& call) {
    call.problem = p;
    call.weight = weight_transposed ? dense(out_features).transposed() : dense(in_features);
    call.x = dense(in_features);
    if (dropout) call.dropout.keep = 1 << 15;
  };
  describe(forward);
  forward.bias = bias ? aligned : nullptr;
  describe(backward);
  backward.dy = dense(out_features);
  const auto told = [&](ShapeClass shape) {
    shape.threads = threads;
    shape.instructions = level_name();
    return std::tuple(shape.text(), presumed_faster(p));
  };
  return py::dict(
      py::arg("forward") = told(forward_class(forward, c10::kCPU)),
      py::arg("backward") = told(backward_class(backward, {true, true, true}, c10::kCPU)));
}

}  // namespace

void add_to(py::module_& m) {
  m.def("cpu_level", &level_name, "The instructions that the CPU kernels use.");
  m.def("cpu_obstacle", &level_obstacle, "Why no CPU kernel serves here; empty where they do.");
  m.def("set_cpu_level", &ask_for_level, py::arg("level"),
        "Make the CPU kernels use \"plain\", \"avx2\", \"avx512\" or \"avx512_bf16\" instructions, "
        "or the processor's \"best\".");
  m.def("explain_cpu_shape", &explain_shape, py::arg("rows"), py::arg("in_features"),
        py::arg("out_features"), py::arg("rank"), py::arg("bfloat16"), py::arg("masters"),
        py::arg("round_adapters"), py::arg("bias"), py::arg("dropout"),
        py::arg("weight_transposed"), py::arg("threads"),
        "For forward and backward: the shape's class, and whether the kernels are presumed faster "
        "than composed.");
}

}  // namespace fused_lora::cpu
