// What most of csrc/torch includes, parsed once.
#include <ATen/core/Tensor.h>
#include <torch/library.h>
