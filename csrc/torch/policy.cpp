#include "torch/policy.h"

#include <pybind11/functional.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "torch/choice.h"

namespace fused_lora {
namespace {

namespace py = pybind11;

// decide(device, shape, presumed_faster, time) -> "fused" or "composed". device: "cpu" or "cuda:0".
// time() -> (fused, composed) in milliseconds, or None where memory does not suffice; None in its
// place where nothing can be timed.
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
    const auto path = (*kept)(shape.device.str(), shape.text(), fast, timer).cast<std::string>();
    return path == "fused" ? Path::kFused : Path::kComposed;
  });
}

}  // namespace

void add_policy_to(py::module_& m) {
  m.def("set_policy", &set_python_policy, py::arg("decide"),
        "Set who chooses between the fused and the composed path.");
  m.def(
      "time_in_turns",
      [](const std::function<double()>& fused, const std::function<double()>& composed) {
        const Times times = time_in_turns(fused, composed);
        return std::pair(times.fused, times.composed);
      },
      py::arg("fused"), py::arg("composed"),
      "The milliseconds that a CPU's paths are compared by, of functions that run one and return "
      "what it took.");
  m.def("forget_choices", &forget_choices, py::call_guard<py::gil_scoped_release>(),
        "Let every choice be made again.");
}

}  // namespace fused_lora
