#include "torch/checker.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "common/dropout.h"

namespace fused_lora::checks {
namespace {

bool is_half(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16;
}

}  // namespace

using at::Tensor;

std::string dtype_name(at::ScalarType dtype) {
  return std::string("torch.").append(c10::getDtypeNames(dtype).first);
}

void Checker::dimensions(const Tensor& t, const char* name) const {
  TORCH_CHECK_VALUE(t.dim() >= 1, op, ": ", name, " must have at least 1 dimension, got shape ",
                    t.sym_sizes());
}

void Checker::matrix(const Tensor& t, const char* name, const char* shape) const {
  TORCH_CHECK_VALUE(t.dim() == 2, op, ": ", name, " must be 2-D (", shape, "), got shape ",
                    t.sym_sizes());
}

void Checker::size(const Tensor& t, const char* name, int64_t dim, const char* meaning,
                   const c10::SymInt& expected, const char* source) const {
  TORCH_CHECK_VALUE(t.sym_size(dim) == expected, op, ": ", name, " must have ", meaning, " = ",
                    expected, " (as ", source, ") in dimension ", dim, ", got shape ",
                    t.sym_sizes());
}

void Checker::rows(const Tensor& t, const char* name, const Tensor& like,
                   const char* source) const {
  TORCH_CHECK_VALUE(t.dim() == like.dim(), op, ": ", name, " must have as many dimensions as ",
                    source, " (", like.dim(), "), got shape ", t.sym_sizes());
  for (int64_t d = 0; d + 1 < t.dim(); ++d) size(t, name, d, "rows", like.sym_size(d), source);
}

void Checker::device(const Tensor& t, const char* name, const Tensor& like,
                     const char* source) const {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " must be on ", like.device(),
                    " (as ", source, "), got ", t.device());
}

void Checker::dtype(const Tensor& t, const char* name, at::ScalarType expected,
                    const char* source) const {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, op, ": ", name, " must be ", dtype_name(expected),
                   " (as ", source, "), got ", dtype_name(t.scalar_type()));
}

void Checker::is_float(at::ScalarType dtype, const char* name) const {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || is_half(dtype), op, ": ", name,
                   " must be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got ",
                   dtype_name(dtype));
}

void Checker::adapter_matrices(const Tensor& a, const char* name_a, const Tensor& b,
                               const char* name_b) const {
  matrix(a, name_a, "rank×in_features");
  matrix(b, name_b, "out_features×rank");
}

void Checker::adapter_ranks(const Tensor& a, const char* name_a, const Tensor& b,
                            const char* name_b) const {
  size(b, name_b, 1, "rank", a.sym_size(0), name_a);
  TORCH_CHECK_VALUE(a.sym_size(0) >= 1, op, ": ", name_a, " must have rank ≥ 1, got shape ",
                    a.sym_sizes());
}

void Checker::adapter_dtypes(const Tensor& a, const char* name_a, const Tensor& b,
                             const char* name_b, at::ScalarType dtype, const char* source) const {
  const auto own = a.scalar_type();
  TORCH_CHECK_TYPE(own == dtype || (own == at::kFloat && is_half(dtype)), op, ": ", name_a,
                   " must be ", dtype_name(dtype), " (as ", source, ")",
                   is_half(dtype) ? " or torch.float32 (masters)" : "", ", got ", dtype_name(own));
  this->dtype(b, name_b, own, name_a);
}

void Checker::probability(double p, const char* name) const {
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, op, ": ", name, " must be in [0, 1], got ", p);
}

void Checker::seed(const Tensor& seed) const {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, op, ": seed must be torch.int64, got ",
                   dtype_name(seed.scalar_type()));
  TORCH_CHECK_VALUE(seed.sym_numel() == 1, op, ": seed must hold one number, got shape ",
                    seed.sym_sizes());
}

void Checker::dropout(double dropout_p, const std::optional<Tensor>& given, const Tensor& like,
                      const char* source) const {
  probability(dropout_p, "dropout_p");
  if (dropout_p > 0.0) {
    TORCH_CHECK_VALUE(given.has_value(), op, ": seed must be given with dropout_p > 0");
    seed(*given);
    device(*given, "seed", like, source);
  }
}

void Checker::column_offset(int64_t offset) const {
  TORCH_CHECK_VALUE(offset >= 0 && offset % kLanes == 0, op,
                    ": column_offset must be a multiple of ", kLanes, " and ≥ 0, got ", offset);
}

}  // namespace fused_lora::checks
