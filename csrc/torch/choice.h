// Which of two paths `auto` takes. A choice is made once for a class of shapes and holds for the
// process, so that a checkpoint's recompute takes the path that the forward took. How it is made is
// a policy that the Python package sets (fused_lora/choices.py): it is asked at the first call of a
// class, and later calls cost a look into a hash table.
#pragma once

#include <functional>
#include <optional>

#include "torch/path.h"
#include "torch/shape_class.h"

namespace fused_lora {

struct Times {
  double fused, composed;  // milliseconds
};

// Of functions that run a path and return its milliseconds: their least times, in turns. Whoever
// else is busy on the machine only ever adds to a time, and perhaps to one path's. So turns go on
// until each has come near its least time repeatedly, for some milliseconds at least and some tens
// at most; long paths have three turns.
Times time_in_turns(const std::function<double()>& fused, const std::function<double()>& composed);

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

}  // namespace fused_lora
