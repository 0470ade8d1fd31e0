// A batch whose rows belong to different adapters, on the CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/fused/mixed_batch.h"
#include "torch/cpu/backend.h"
#include "torch/mixed_batch/run.h"

namespace fused_lora {

template <>
class MixedOperands<cpu::Backend> {
 public:
  using ForwardCall = cpu::fused::MixedForwardCall;
  using BackwardCall = cpu::fused::MixedBackwardCall;

  static at::Tensor index_of_rows(const at::Tensor& index, const at::Tensor& rows, size_t count) {
    const at::Tensor own = index.contiguous();
    const int64_t* numbers = own.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < own.numel(); ++i) {
      TORCH_CHECK_INDEX(numbers[i] < static_cast<int64_t>(count),
                        "lora_linear: adapter_index must be below ", count,
                        " (the adapters given), or negative for none, got ", numbers[i]);
    }
    return composed::index_of_rows(own, rows).contiguous();
  }

  explicit MixedOperands(const composed::MixedAdapters& given) : given_(given) {
    adapters_.resize(given.a.size());
    for (size_t i = 0; i < given.a.size(); ++i) {
      cpu::fused::Adapter& adapter = adapters_[i];
      adapter.a = cpu::Backend::view(given.a[i]);
      adapter.b = cpu::Backend::view(given.b[i]);
      adapter.rank = given.a[i].size(0);
      adapter.scaling = static_cast<float>(given.scaling[i]);
    }
  }

  template <typename Call>
  void fill(Call& call) const {
    call.adapters = adapters_.data();
    call.adapter_count = given_.count();
    call.adapter_of_row = given_.index.const_data_ptr<int64_t>();
  }

  void allocate(BackwardCall& /*call*/, const composed::MixedNeeded& needed) {
    made_.a.resize(adapters_.size());
    made_.b.resize(adapters_.size());
    const auto make = [](at::Tensor& to, const at::Tensor& like) {
      to = at::empty(like.sizes(), like.options());
      return to.mutable_data_ptr();
    };
    for (size_t i = 0; i < adapters_.size(); ++i) {
      if (needed.a[i]) adapters_[i].da = make(made_.a[i], given_.a[i]);
      if (needed.b[i]) adapters_[i].db = make(made_.b[i], given_.b[i]);
    }
  }

  composed::MixedGradients gradients(const composed::MixedNeeded& /*needed*/) { return made_; }

 private:
  const composed::MixedAdapters& given_;
  std::vector<cpu::fused::Adapter> adapters_;
  composed::MixedGradients made_;
};

TORCH_LIBRARY_IMPL(fused_lora, CPU, m) {
  m.impl("lora_linear_mixed_forward", &MixedOps<cpu::Backend>::forward);
  m.impl("lora_linear_mixed_backward", &MixedOps<cpu::Backend>::backward);
}

}  // namespace fused_lora
