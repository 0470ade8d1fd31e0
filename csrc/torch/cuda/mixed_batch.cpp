// A batch whose rows belong to different adapters, on CUDA: A and B are stacked along the rank, and
// the kernels are told which ranks a row uses. Nothing waits for the device.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels/row_adapters.h"
#include "torch/cuda/backend.h"
#include "torch/mixed_batch/run.h"
#include "torch/registration.h"

namespace fused_lora {

template <>
class MixedOperands<cuda::Backend> {
 public:
  using ForwardCall = kernels::ForwardCall;
  using BackwardCall = kernels::BackwardCall;

  // An index beyond the adapters, which only the device could see, means none.
  static at::Tensor index_of_rows(const at::Tensor& index, const at::Tensor& rows,
                                  size_t /*count*/) {
    return composed::index_of_rows(index, rows).contiguous();
  }

  explicit MixedOperands(const composed::MixedAdapters& given)
      : given_(given),
        a_(at::cat(given.a, 0)),
        b_(at::cat(given.b, 1)),
        rows_(at::empty({given.index.size(0) * static_cast<int64_t>(sizeof(RowAdapter))},
                        given.index.options().dtype(at::kByte))) {
    std::vector<RowAdapter> adapters;
    int32_t begin = 0;
    for (size_t i = 0; i < given.a.size(); ++i) {
      const auto end = begin + static_cast<int32_t>(given.a[i].size(0));
      adapters.push_back({begin, end, static_cast<float>(given.scaling[i])});
      begin = end;
    }
    kernels::RowAdaptersCall call;
    call.index = given.index.const_data_ptr<int64_t>();
    call.rows = given.index.size(0);
    call.adapters = adapters.data();
    call.count = given.count();
    call.out = static_cast<RowAdapter*>(rows_.mutable_data_ptr());
    cuda::check(kernels::run(call, cuda::current_stream(given.index.device())),
                "the row adapters' launch");
  }

  template <typename Call>
  void fill(Call& call) const {
    call.lora_a = cuda::view(a_);
    call.lora_b = cuda::view(b_);
    call.row_adapters = static_cast<const RowAdapter*>(rows_.const_data_ptr());
  }

  void allocate(BackwardCall& call, const composed::MixedNeeded& needed) {
    if (needed.any_a()) {
      da_ = at::empty(a_.sizes(), a_.options());
      call.dlora_a = da_.mutable_data_ptr();
    }
    if (needed.any_b()) {
      db_ = at::empty(b_.sizes(), b_.options());
      call.dlora_b = db_.mutable_data_ptr();
    }
  }

  // Copies, as an op's results may not share memory.
  composed::MixedGradients gradients(const composed::MixedNeeded& needed) {
    composed::MixedGradients made;
    made.a.resize(given_.a.size());
    made.b.resize(given_.b.size());
    int64_t begin = 0;
    for (size_t i = 0; i < given_.a.size(); ++i) {
      const int64_t rank = given_.a[i].size(0);
      const auto format = at::MemoryFormat::Contiguous;
      if (needed.a[i]) made.a[i] = da_.narrow(0, begin, rank).clone(format);
      if (needed.b[i]) made.b[i] = db_.narrow(1, begin, rank).clone(format);
      begin += rank;
    }
    return made;
  }

 private:
  const composed::MixedAdapters& given_;
  at::Tensor a_, b_, rows_, da_, db_;
};

TORCH_LIBRARY_IMPL(FUSED_LORA_LIBRARY, FUSED_LORA_CUDA_KEY, m) {
  m.impl("lora_linear_mixed_forward", &MixedOps<cuda::Backend>::forward);
  m.impl("lora_linear_mixed_backward", &MixedOps<cuda::Backend>::backward);
}

}  // namespace fused_lora
