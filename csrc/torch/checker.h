// What ops demand of one argument or of two beside each other. `op` leads each message.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace fused_lora::checks {

// "torch.float32", as Python writes it.
std::string dtype_name(at::ScalarType dtype);

// `source` is the argument that `expected` and `like` are of, `meaning` what a dimension holds.
struct Checker {
  const char* op;

  void dimensions(const at::Tensor& t, const char* name) const;
  void matrix(const at::Tensor& t, const char* name, const char* shape) const;
  void size(const at::Tensor& t, const char* name, int64_t dim, const char* meaning,
            const c10::SymInt& expected, const char* source) const;
  // t has the dimensions of `like` but for the last.
  void rows(const at::Tensor& t, const char* name, const at::Tensor& like,
            const char* source) const;
  void device(const at::Tensor& t, const char* name, const at::Tensor& like,
              const char* source) const;
  void dtype(const at::Tensor& t, const char* name, at::ScalarType expected,
             const char* source) const;
  void is_float(at::ScalarType dtype, const char* name) const;

  // Of one adapter: that A and B are matrices; of one rank; and of dtypes that go with `dtype`.
  void adapter_matrices(const at::Tensor& a, const char* name_a, const at::Tensor& b,
                        const char* name_b) const;
  void adapter_ranks(const at::Tensor& a, const char* name_a, const at::Tensor& b,
                     const char* name_b) const;
  void adapter_dtypes(const at::Tensor& a, const char* name_a, const at::Tensor& b,
                      const char* name_b, at::ScalarType dtype, const char* source) const;

  void probability(double p, const char* name) const;
  void seed(const at::Tensor& seed) const;
  // The probability, and the seed that one above 0 wants, on the device of `like`.
  void dropout(double dropout_p, const std::optional<at::Tensor>& given, const at::Tensor& like,
               const char* source) const;
  void column_offset(int64_t offset) const;
};

}  // namespace fused_lora::checks
