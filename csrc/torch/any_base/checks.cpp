#include "torch/any_base/checks.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <string>

#include "common/dropout.h"
#include "composed/composed.h"
#include "composed/shapes.h"

namespace fused_lora::checks {
namespace {

using at::Tensor;

// "torch.float32", as Python writes it.
std::string dtype_name(at::ScalarType dtype) {
  return std::string("torch.").append(c10::getDtypeNames(dtype).first);
}

bool is_half(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16;
}

void check_matrix(const Tensor& t, const char* name, const char* shape) {
  TORCH_CHECK_VALUE(t.dim() == 2, "lora_add: ", name, " must be 2-D (", shape, "), got shape ",
                    t.sym_sizes());
}

void check_size(const Tensor& t, const char* name, int64_t dim, const char* meaning,
                const c10::SymInt& expected, const char* source) {
  TORCH_CHECK_VALUE(t.sym_size(dim) == expected, "lora_add: ", name, " must have ", meaning, " = ",
                    expected, " (as ", source, ") in dimension ", dim, ", got shape ",
                    t.sym_sizes());
}

void check_dtype(const Tensor& t, const char* name, at::ScalarType expected, const char* source) {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, "lora_add: ", name, " must be ",
                   dtype_name(expected), " (as ", source, "), got ", dtype_name(t.scalar_type()));
}

void check_device(const Tensor& t, const char* name, const Tensor& like, const char* source) {
  TORCH_CHECK_VALUE(t.device() == like.device(), "lora_add: ", name, " must be on ", like.device(),
                    " (as ", source, "), got ", t.device());
}

void check_float(at::ScalarType dtype, const char* name) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || is_half(dtype),
                   "lora_add: ", name,
                   " must be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got ",
                   dtype_name(dtype));
}

// `rows` is the operand that is there in any case: x in forward, dy in backward. dtype: x's.
void check_adapter(const Tensor& rows, const char* name, at::ScalarType dtype, const Tensor& lora_a,
                   const Tensor& lora_b, double dropout_p, const std::optional<Tensor>& seed,
                   int64_t column_offset) {
  check_matrix(lora_a, "lora_a", "rank×in_features");
  check_matrix(lora_b, "lora_b", "out_features×rank");
  check_size(lora_b, "lora_b", 1, "rank", lora_a.sym_size(0), "lora_a");
  TORCH_CHECK_VALUE(lora_a.sym_size(0) >= 1, "lora_add: lora_a must have rank ≥ 1, got shape ",
                    lora_a.sym_sizes());
  check_float(dtype, "x");
  const auto adapter = lora_a.scalar_type();
  TORCH_CHECK_TYPE(adapter == dtype || (adapter == at::kFloat && is_half(dtype)),
                   "lora_add: lora_a must be ", dtype_name(dtype), " (as x)",
                   is_half(dtype) ? " or torch.float32 (masters)" : "", ", got ",
                   dtype_name(adapter));
  check_dtype(lora_b, "lora_b", adapter, "lora_a");
  check_device(lora_a, "lora_a", rows, name);
  check_device(lora_b, "lora_b", rows, name);
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p <= 1.0,
                    "lora_add: dropout_p must be in [0, 1], got ", dropout_p);
  if (dropout_p > 0.0) {
    TORCH_CHECK_VALUE(seed.has_value(), "lora_add: seed must be given with dropout_p > 0");
    TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, "lora_add: seed must be torch.int64, got ",
                     dtype_name(seed->scalar_type()));
    TORCH_CHECK_VALUE(seed->sym_numel() == 1, "lora_add: seed must hold one number, got shape ",
                      seed->sym_sizes());
    check_device(*seed, "seed", rows, name);
  }
  TORCH_CHECK_VALUE(column_offset >= 0 && column_offset % kLanes == 0,
                    "lora_add: column_offset must be a multiple of ", kLanes, " and ≥ 0, got ",
                    column_offset);
}

// t has the rows of `rows`.
void check_rows(const Tensor& t, const char* name, const Tensor& rows, const char* source) {
  TORCH_CHECK_VALUE(t.dim() == rows.dim(), "lora_add: ", name, " must have as many dimensions as ",
                    source, " (", rows.dim(), "), got shape ", t.sym_sizes());
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    check_size(t, name, d, "rows", rows.sym_size(d), source);
  }
}

void check_dimensions(const Tensor& rows, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() >= 1, "lora_add: ", name,
                    " must have at least 1 dimension, got shape ", rows.sym_sizes());
}

}  // namespace

void add_forward_arguments(const Tensor& base, const Tensor& x, const Tensor& lora_a,
                           const Tensor& lora_b, double dropout_p,
                           const std::optional<Tensor>& seed, int64_t column_offset) {
  check_dimensions(x, "x");
  check_adapter(x, "x", x.scalar_type(), lora_a, lora_b, dropout_p, seed, column_offset);
  check_size(x, "x", -1, "in_features", lora_a.sym_size(1), "lora_a");
  check_rows(base, "base", x, "x");
  check_size(base, "base", -1, "out_features", lora_b.sym_size(0), "lora_b");
  check_float(base.scalar_type(), "base");
  check_device(base, "base", x, "x");
}

void add_backward_arguments(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& lora_a,
                            const Tensor& lora_b, const std::optional<Tensor>& h,
                            at::ScalarType dtype, double dropout_p,
                            const std::optional<Tensor>& seed, bool round_adapters,
                            const std::array<bool, 3>& needed, int64_t column_offset) {
  check_dimensions(dy, "dy");
  check_adapter(dy, "dy", dtype, lora_a, lora_b, dropout_p, seed, column_offset);
  check_size(dy, "dy", -1, "out_features", lora_b.sym_size(0), "lora_b");
  check_float(dy.scalar_type(), "dy");
  if (needed[1]) {
    TORCH_CHECK_VALUE(x.has_value(), "lora_add: x must be given for dlora_a");
    check_rows(*x, "x", dy, "dy");
    check_size(*x, "x", -1, "in_features", lora_a.sym_size(1), "lora_a");
    check_dtype(*x, "x", dtype, "dtype");
    check_device(*x, "x", dy, "dy");
  }
  if (needed[2]) {
    TORCH_CHECK_VALUE(h.has_value(), "lora_add: h must be given for dlora_b");
    check_matrix(*h, "h", "rows×rank");
    check_size(*h, "h", 0, "rows", composed::sym_rows(dy), "dy");
    check_size(*h, "h", 1, "rank", lora_a.sym_size(0), "lora_a");
    check_dtype(*h, "h", composed::rank_dtype(dtype, lora_a, round_adapters), "the adapters'");
    check_device(*h, "h", dy, "dy");
  }
}

}  // namespace fused_lora::checks
