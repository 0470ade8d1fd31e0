// Which of two paths `auto` takes on CUDA. A choice is made once for a class of shapes and holds
// for the process, so that a checkpoint's recompute takes the path that the forward took. How it is
// made is a policy that the Python package sets (fused_lora/choices.py): it is asked at the first
// call of a class, and later calls cost a look into a hash table.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "kernels/lora_linear.h"
#include "torch/path.h"

namespace fused_lora::cuda {

// How the loads see an operand: by rows or columns of 16-byte chunks, or neither.
enum class Layout : uint8_t { kRows, kColumns, kNeither, kAbsent };
Layout layout_of(const kernels::MatrixView& view, kernels::DType dtype);

// The calls that one choice serves: the same but for the number of rows, which counts by powers of
// two.
struct ShapeClass {
  int device = 0;  // its index
  bool backward = false;
  kernels::Problem problem;
  bool dropout = false;
  bool bias = false;                                                         // of a forward
  bool needs_x = false, needs_a = false, needs_b = false;                    // of a backward
  Layout rows = Layout::kRows, x = Layout::kAbsent, weight = Layout::kRows;  // rows: x or dy

  static ShapeClass of(const kernels::ForwardCall& call, int device);
  // needed: dx, dlora_a, dlora_b. The call's own pointers to them are not looked at.
  static ShapeClass of(const kernels::BackwardCall& call, const std::array<bool, 3>& needed,
                       int device);

  // Everything but the device, in words: how the class is known on disk.
  std::string text() const;

  using Key = std::array<int64_t, 9>;
  Key key() const;
};

struct Times {
  double fused, composed;  // milliseconds
};

// A call that two paths can compute.
class Candidate {
 public:
  virtual bool presumed_faster() = 0;
  virtual bool capturing() = 0;  // into a CUDA graph, where nothing can be timed
  // Runs both paths, several times. Nothing where memory does not suffice.
  virtual std::optional<Times> time() = 0;

 protected:
  ~Candidate() = default;
};

// What decides where nothing was timed: the fused kernels where they are presumed faster.
Path untimed_choice(Candidate& call);

// kFused or kComposed. `deterministic`: torch.use_deterministic_algorithms is on, and the choice
// may depend on nothing but the call.
Path choose(const ShapeClass& shape, bool deterministic, Candidate& call);

// Without a policy untimed_choice decides.
using Policy = std::function<Path(const ShapeClass& shape, Candidate& call)>;
void set_policy(Policy policy);

void forget_choices();

}  // namespace fused_lora::cuda
