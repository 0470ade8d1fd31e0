#include "torch/cpu/module.h"

#include <array>
#include <string>
#include <tuple>

#include "cpu/fused/weight_panels.h"
#include "torch/cpu/backend.h"
#include "torch/cpu/level.h"
#include "torch/cpu/packing.h"

namespace fused_lora::cpu {
namespace {

namespace py = pybind11;

// The classes of calls with dense operands, what a layer hands over as a rule: (forward, backward),
// each (class, whether presumed faster). mixed: adapters that the rows belong to, whose ranks are
// `rank` together; 0 where all rows belong to one.
py::dict explain_shape(int64_t rows, int64_t in_features, int64_t out_features, int64_t rank,
                       bool bfloat16, bool masters, bool round_adapters, bool bias, bool dropout,
                       bool weight_transposed, bool weight_packed, bool adapter_alone, int threads,
                       int64_t mixed) {
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
  p.weight_in_panels = weight_packed;
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
  if (adapter_alone) {
    forward.weight = backward.weight = {};
    forward.base = forward.y = aligned;
  }
  const auto told = [&](ShapeClass shape) {
    if (adapter_alone) {
      shape.add_to(bfloat16 ? at::kBFloat16 : at::kFloat);
      shape.in_place = !shape.backward;
    }
    shape.threads = threads;
    shape.mixed = mixed;
    shape.instructions = level_name();
    return std::tuple(shape.text(), kPresumedFaster);
  };
  return py::dict(
      py::arg("forward") = told(forward_class(forward, c10::kCPU)),
      py::arg("backward") = told(backward_class(backward, {true, true, true}, c10::kCPU)));
}

// To a module's dict of Parameters, to its weight's object and tensor, and to those of the weight's
// memory. The last object is made where there is none yet, since a look at the memory by anyone
// leaves it behind, as one reference more.
using References = std::array<int64_t, 5>;

References references_of(const py::dict& parameters) {
  const py::handle weight = parameters["weight"];
  const py::object memory = weight.attr("untyped_storage")();
  const auto tensor = weight.cast<at::Tensor>();
  return {Py_REFCNT(parameters.ptr()), Py_REFCNT(weight.ptr()),
          static_cast<int64_t>(tensor.use_count()), Py_REFCNT(memory.ptr()),
          static_cast<int64_t>(tensor.storage().use_count())};
}

// Under the interpreter's lock from the look to the end, so that no other thread can come to hold
// any of it.
bool empty_unless_held(const py::dict& parameters, const References& known) {
  if (references_of(parameters) != known) return false;
  empty(parameters["weight"].cast<at::Tensor>());
  return true;
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
        py::arg("weight_transposed"), py::arg("weight_packed"), py::arg("adapter_alone"),
        py::arg("threads"), py::arg("mixed") = 0,
        "For forward and backward: the shape's class, and whether the kernels are presumed faster "
        "than composed.");

  m.def("fits_panels", &fused::fits_panels, py::arg("out_features"), py::arg("in_features"),
        "Whether a weight of this shape can be packed.");
  m.def("pack_parameter", &pack_parameter, py::arg("parameter"), py::arg("transposed"),
        py::call_guard<py::gil_scoped_release>(),
        "A Parameter's data in panels; transposed where it is stored in_features×out_features.");
  m.def(
      "references", &references_of, py::arg("parameters"),
      "How many references there are to a dict of Parameters, to its \"weight\" and to that one's "
      "memory.");
  m.def("empty_unless_held", &empty_unless_held, py::arg("parameters"), py::arg("references"),
        "Let the \"weight\" of a dict hold no data, unless there are other references than these.");
  m.def("restore_parameter", &restore, py::arg("parameter"), py::arg("packed"), py::arg("strides"),
        py::arg("transposed"), py::call_guard<py::gil_scoped_release>(),
        "Give an emptied Parameter its data again, with the strides it had.");
}

}  // namespace fused_lora::cpu
