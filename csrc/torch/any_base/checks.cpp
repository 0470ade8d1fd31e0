#include "torch/any_base/checks.h"

#include <c10/util/Exception.h>

#include "composed/composed.h"
#include "composed/shapes.h"
#include "torch/checker.h"

namespace fused_lora::checks {
namespace {

using at::Tensor;

constexpr Checker kAdd = {"lora_add"};

// `rows` is the operand that is there in any case: x in forward, dy in backward. dtype: x's.
void check_adapter(const Tensor& rows, const char* name, at::ScalarType dtype, const Tensor& lora_a,
                   const Tensor& lora_b, double dropout_p, const std::optional<Tensor>& seed,
                   int64_t column_offset) {
  kAdd.adapter_matrices(lora_a, "lora_a", lora_b, "lora_b");
  kAdd.adapter_ranks(lora_a, "lora_a", lora_b, "lora_b");
  kAdd.is_float(dtype, "x");
  kAdd.adapter_dtypes(lora_a, "lora_a", lora_b, "lora_b", dtype, "x");
  kAdd.device(lora_a, "lora_a", rows, name);
  kAdd.device(lora_b, "lora_b", rows, name);
  kAdd.dropout(dropout_p, seed, rows, name);
  kAdd.column_offset(column_offset);
}

}  // namespace

void add_forward_arguments(const Tensor& base, const Tensor& x, const Tensor& lora_a,
                           const Tensor& lora_b, double dropout_p,
                           const std::optional<Tensor>& seed, int64_t column_offset) {
  kAdd.dimensions(x, "x");
  check_adapter(x, "x", x.scalar_type(), lora_a, lora_b, dropout_p, seed, column_offset);
  kAdd.size(x, "x", -1, "in_features", lora_a.sym_size(1), "lora_a");
  kAdd.rows(base, "base", x, "x");
  kAdd.size(base, "base", -1, "out_features", lora_b.sym_size(0), "lora_b");
  kAdd.is_float(base.scalar_type(), "base");
  kAdd.device(base, "base", x, "x");
}

void add_backward_arguments(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& lora_a,
                            const Tensor& lora_b, const std::optional<Tensor>& h,
                            at::ScalarType dtype, double dropout_p,
                            const std::optional<Tensor>& seed, bool round_adapters,
                            const std::array<bool, 3>& needed, int64_t column_offset) {
  kAdd.dimensions(dy, "dy");
  check_adapter(dy, "dy", dtype, lora_a, lora_b, dropout_p, seed, column_offset);
  kAdd.size(dy, "dy", -1, "out_features", lora_b.sym_size(0), "lora_b");
  kAdd.is_float(dy.scalar_type(), "dy");
  if (needed[1]) {
    TORCH_CHECK_VALUE(x.has_value(), "lora_add: x must be given for dlora_a");
    kAdd.rows(*x, "x", dy, "dy");
    kAdd.size(*x, "x", -1, "in_features", lora_a.sym_size(1), "lora_a");
    kAdd.dtype(*x, "x", dtype, "dtype");
    kAdd.device(*x, "x", dy, "dy");
  }
  if (needed[2]) {
    TORCH_CHECK_VALUE(h.has_value(), "lora_add: h must be given for dlora_b");
    kAdd.matrix(*h, "h", "rows×rank");
    kAdd.size(*h, "h", 0, "rows", composed::sym_rows(dy), "dy");
    kAdd.size(*h, "h", 1, "rank", lora_a.sym_size(0), "lora_a");
    kAdd.dtype(*h, "h", composed::rank_dtype(dtype, lora_a, round_adapters), "the adapters'");
    kAdd.device(*h, "h", dy, "dy");
  }
}

}  // namespace fused_lora::checks
