#include "torch/checks.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <string>

#include "composed/shapes.h"
#include "torch/checker.h"
#include "torch/packed_weight.h"

namespace fused_lora::checks {
namespace {

using at::Tensor;

constexpr Checker kLinear = {"lora_linear"};
constexpr Checker kMask = {"dropout_mask"};

void check_weight(const Tensor& weight) {
  if (is_packed(weight)) {
    packed_weight("lora_linear", weight);
  } else {
    kLinear.matrix(weight, "weight", "out_features×in_features");
  }
}

void check_may_be_packed(const char* op, const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.device().is_cpu() || weight.device().is_meta(), op,
                    ": packed weights serve on the CPU alone, got one on ", weight.device());
  TORCH_CHECK_TYPE(has_panels(weight.scalar_type()), op,
                   ": a packed weight must be torch.float32 or torch.bfloat16, got ",
                   dtype_name(weight.scalar_type()));
}

// `rows` is the operand that the caller streams: x in forward, dy in backward. names: of the
// adapter's matrices.
struct Names {
  const char *a = "lora_a", *b = "lora_b";
};

void check_shapes(const Tensor& rows, const char* name, const Tensor& weight) {
  kLinear.dimensions(rows, name);
  check_weight(weight);
}

void check_adapter_shapes(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                          const Names& names) {
  kLinear.adapter_matrices(lora_a, names.a, lora_b, names.b);
  kLinear.size(lora_a, names.a, 1, "in_features", sym_in_features(weight), "weight");
  kLinear.size(lora_b, names.b, 0, "out_features", sym_out_features(weight), "weight");
  kLinear.adapter_ranks(lora_a, names.a, lora_b, names.b);
}

void check_dtypes(const Tensor& rows, const char* name, const Tensor& weight) {
  kLinear.is_float(rows.scalar_type(), name);
  kLinear.dtype(weight, "weight", rows.scalar_type(), name);
}

// A list of one value for each entry of another, the source.
void check_count(const char* op, size_t count, const char* name, size_t expected,
                 const char* source) {
  TORCH_CHECK_VALUE(count == expected, op, ": ", name, " must have ", expected,
                    expected == 1 ? " entry" : " entries", " (as ", source, "), got ", count);
}

constexpr const char* kGrouped = "lora_linear_grouped";

// The lists but for the first, which says how many projections there are.
template <typename Seeds>
void check_counts(size_t projections, const char* source, at::TensorList lora_a,
                  at::TensorList lora_b, at::ArrayRef<double> scalings,
                  at::ArrayRef<double> dropout_p, const Seeds& seeds) {
  TORCH_CHECK_VALUE(projections >= 1, "lora_linear_grouped: ", source, " must not be empty");
  check_count(kGrouped, lora_a.size(), "lora_a", projections, source);
  check_count(kGrouped, lora_b.size(), "lora_b", projections, source);
  check_count(kGrouped, scalings.size(), "scalings", projections, source);
  check_count(kGrouped, dropout_p.size(), "dropout_p", projections, source);
  check_count(kGrouped, seeds.size(), "seeds", projections, source);
  for (size_t i = 1; i < projections; ++i) {
    TORCH_CHECK_TYPE(lora_a[i].scalar_type() == lora_a[0].scalar_type(),
                     "lora_linear_grouped: lora_a[", i, "] must be ",
                     dtype_name(lora_a[0].scalar_type()), " (as lora_a[0]), got ",
                     dtype_name(lora_a[i].scalar_type()));
  }
}

// Calls check(i) for each projection; an error says which it was.
template <typename Check>
void check_each(size_t projections, const Check& check) {
  for (size_t i = 0; i < projections; ++i) {
    try {
      check(i);
    } catch (c10::Error& error) {
      error.add_context(c10::str("of projection ", i, " of ", kGrouped));
      throw;
    }
  }
}

void check_operands(const Tensor& rows, const char* name, const Tensor& weight,
                    const Tensor& lora_a, const Tensor& lora_b, double dropout_p,
                    const std::optional<Tensor>& seed, int64_t column_offset) {
  const Names names;
  check_shapes(rows, name, weight);
  check_adapter_shapes(weight, lora_a, lora_b, names);
  check_dtypes(rows, name, weight);
  kLinear.adapter_dtypes(lora_a, names.a, lora_b, names.b, rows.scalar_type(), name);
  kLinear.device(weight, "weight", rows, name);
  kLinear.device(lora_a, names.a, rows, name);
  kLinear.device(lora_b, names.b, rows, name);
  kLinear.dropout(dropout_p, seed, rows, name);
  kLinear.column_offset(column_offset);
}

void check_x(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  kLinear.size(x, "x", -1, "in_features", sym_in_features(weight), "weight");
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->dim() == 1, "lora_linear: bias must be 1-D (out_features), got shape ",
                      bias->sym_sizes());
    kLinear.size(*bias, "bias", 0, "out_features", sym_out_features(weight), "weight");
    kLinear.dtype(*bias, "bias", x.scalar_type(), "x");
    kLinear.device(*bias, "bias", x, "x");
  }
}

// x and h of a backward, where they are needed, and that a packed weight is not.
void check_saved(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& weight,
                 const std::optional<Tensor>& h, const c10::SymInt& rank, const Tensor& lora_a,
                 const char* name_a, bool round_adapters, bool needs_weight, bool needs_a,
                 bool needs_b) {
  kLinear.size(dy, "dy", -1, "out_features", sym_out_features(weight), "weight");
  TORCH_CHECK_VALUE(!needs_weight || !is_packed(weight),
                    "lora_linear: weight is packed, and packed weights are frozen: there is no "
                    "gradient of it");
  if (needs_weight || needs_a) {
    TORCH_CHECK_VALUE(x.has_value(), "lora_linear: x must be given for dweight and dlora_a");
    kLinear.rows(*x, "x", dy, "dy");
    kLinear.size(*x, "x", -1, "in_features", sym_in_features(weight), "weight");
    kLinear.dtype(*x, "x", dy.scalar_type(), "dy");
    kLinear.device(*x, "x", dy, "dy");
  }
  if (needs_b) {
    TORCH_CHECK_VALUE(h.has_value(), "lora_linear: h must be given for dlora_b");
    kLinear.matrix(*h, "h", "rows×rank");
    kLinear.size(*h, "h", 0, "rows", composed::sym_rows(dy), "dy");
    kLinear.size(*h, "h", 1, "rank", rank, name_a);
    const bool rounded = round_adapters || dy.scalar_type() == lora_a.scalar_type();
    kLinear.dtype(*h, "h", rounded ? dy.scalar_type() : lora_a.scalar_type(),
                  rounded ? "dy" : name_a);
    kLinear.device(*h, "h", dy, "dy");
  }
}

// A value for each adapter.
void check_adapter_count(size_t count, const char* name, at::TensorList lora_a) {
  check_count("lora_linear", count, name, lora_a.size(), "lora_a");
}

void check_mixed_operands(const Tensor& rows, const char* name, const Tensor& weight,
                          at::TensorList lora_a, at::TensorList lora_b, const Tensor& index,
                          at::ArrayRef<double> scaling, double dropout_p,
                          const std::optional<Tensor>& seed) {
  check_shapes(rows, name, weight);
  TORCH_CHECK_VALUE(!lora_a.empty(), "lora_linear: lora_a must have at least 1 entry, got none");
  check_adapter_count(lora_b.size(), "lora_b", lora_a);
  check_adapter_count(scaling.size(), "scaling", lora_a);
  check_dtypes(rows, name, weight);
  kLinear.device(weight, "weight", rows, name);
  for (size_t i = 0; i < lora_a.size(); ++i) {
    const std::string which = "[" + std::to_string(i) + "]";
    const std::string name_a = "lora_a" + which, name_b = "lora_b" + which;
    const Names names = {name_a.c_str(), name_b.c_str()};
    check_adapter_shapes(weight, lora_a[i], lora_b[i], names);
    kLinear.adapter_dtypes(lora_a[i], names.a, lora_b[i], names.b, rows.scalar_type(), name);
    kLinear.dtype(lora_a[i], names.a, lora_a[0].scalar_type(), "lora_a[0]");
    kLinear.device(lora_a[i], names.a, rows, name);
    kLinear.device(lora_b[i], names.b, rows, name);
  }
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong,
                   "lora_linear: adapter_index must be torch.int64, got ",
                   dtype_name(index.scalar_type()));
  kLinear.device(index, "adapter_index", rows, name);
  bool leads = index.dim() < rows.dim();
  for (int64_t d = 0; leads && d < index.dim(); ++d) leads = index.sym_size(d) == rows.sym_size(d);
  TORCH_CHECK_VALUE(leads, "lora_linear: adapter_index must have the first dimensions of ", name,
                    " (", rows.sym_sizes(), "), got shape ", index.sym_sizes());
  kLinear.dropout(dropout_p, seed, rows, name);
}

c10::SymInt sum_of_ranks(at::TensorList lora_a) {
  c10::SymInt ranks = 0;
  for (const Tensor& a : lora_a) ranks = ranks + a.sym_size(0);
  return ranks;
}

}  // namespace

void forward_arguments(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                       const Tensor& lora_b, const std::optional<Tensor>& bias, double dropout_p,
                       const std::optional<Tensor>& seed, int64_t column_offset) {
  check_operands(x, "x", weight, lora_a, lora_b, dropout_p, seed, column_offset);
  check_x(x, weight, bias);
}

void backward_arguments(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& weight,
                        const Tensor& lora_a, const Tensor& lora_b, const std::optional<Tensor>& h,
                        double dropout_p, const std::optional<Tensor>& seed, bool round_adapters,
                        const std::array<bool, 5>& needed, int64_t column_offset) {
  check_operands(dy, "dy", weight, lora_a, lora_b, dropout_p, seed, column_offset);
  check_saved(dy, x, weight, h, lora_a.sym_size(0), lora_a, "lora_a", round_adapters, needed[1],
              needed[2], needed[3]);
}

void mixed_forward_arguments(const Tensor& x, const Tensor& weight, at::TensorList lora_a,
                             at::TensorList lora_b, const Tensor& index,
                             const std::optional<Tensor>& bias, at::ArrayRef<double> scaling,
                             double dropout_p, const std::optional<Tensor>& seed) {
  check_mixed_operands(x, "x", weight, lora_a, lora_b, index, scaling, dropout_p, seed);
  check_x(x, weight, bias);
}

void mixed_backward_arguments(const Tensor& dy, const std::optional<Tensor>& x,
                              const Tensor& weight, at::TensorList lora_a, at::TensorList lora_b,
                              const Tensor& index, const std::optional<Tensor>& h,
                              at::ArrayRef<double> scaling, double dropout_p,
                              const std::optional<Tensor>& seed, bool round_adapters,
                              bool needs_weight, const c10::List<bool>& needs_a,
                              const c10::List<bool>& needs_b) {
  check_mixed_operands(dy, "dy", weight, lora_a, lora_b, index, scaling, dropout_p, seed);
  check_adapter_count(needs_a.size(), "needed_a", lora_a);
  check_adapter_count(needs_b.size(), "needed_b", lora_a);
  const auto any = [](const c10::List<bool>& flags) {
    return std::any_of(flags.begin(), flags.end(), [](bool flag) { return flag; });
  };
  check_saved(dy, x, weight, h, sum_of_ranks(lora_a), lora_a[0], "lora_a", round_adapters,
              needs_weight, any(needs_a), any(needs_b));
}

void grouped_counts(at::TensorList weights, at::TensorList lora_a, at::TensorList lora_b,
                    const ops::OptionalTensors& biases, at::ArrayRef<double> scalings,
                    at::ArrayRef<double> dropout_p, const ops::OptionalTensors& seeds) {
  check_counts(weights.size(), "weights", lora_a, lora_b, scalings, dropout_p, seeds);
  check_count(kGrouped, biases.size(), "biases", weights.size(), "weights");
}

void grouped_forward_arguments(const Tensor& x, at::TensorList weights, at::TensorList lora_a,
                               at::TensorList lora_b, const ops::OptionalTensors& biases,
                               at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
                               const ops::OptionalTensors& seeds) {
  grouped_counts(weights, lora_a, lora_b, biases, scalings, dropout_p, seeds);
  check_each(weights.size(), [&](size_t i) {
    forward_arguments(x, weights[i], lora_a[i], lora_b[i], biases.get(i), dropout_p[i],
                      seeds.get(i), /*column_offset=*/0);
  });
}

void grouped_backward_arguments(at::TensorList dy, const ops::OptionalTensor& x,
                                at::TensorList weights, at::TensorList lora_a,
                                at::TensorList lora_b, const ops::OptionalTensors& h,
                                at::ArrayRef<double> scalings, at::ArrayRef<double> dropout_p,
                                const ops::OptionalTensors& seeds, bool round_adapters,
                                const c10::List<bool>& needed) {
  check_counts(dy.size(), "dy", lora_a, lora_b, scalings, dropout_p, seeds);
  check_count(kGrouped, weights.size(), "weights", dy.size(), "dy");
  check_count(kGrouped, h.size(), "h", dy.size(), "dy");
  TORCH_CHECK_VALUE(needed.size() == 1 + 4 * dy.size(),
                    "lora_linear_grouped: needed must have 1 entry and 4 for each of ", dy.size(),
                    " projections, got ", needed.size());
  check_each(dy.size(), [&](size_t i) {
    std::array<bool, 5> of_one = {needed[0]};
    for (size_t k = 0; k < 4; ++k) of_one[1 + k] = needed[1 + 4 * i + k];
    backward_arguments(dy[i], x, weights[i], lora_a[i], lora_b[i], h.get(i), dropout_p[i],
                       seeds.get(i), round_adapters, of_one, /*column_offset=*/0);
    // The dx are one, and so are their sizes.
    TORCH_CHECK_VALUE(dy[i].sym_sizes().slice(0, dy[i].dim() - 1) ==
                              dy[0].sym_sizes().slice(0, dy[0].dim() - 1) &&
                          sym_in_features(weights[i]) == sym_in_features(weights[0]),
                      "lora_linear: dy must have the rows of dy[0], ", dy[0].sym_sizes(),
                      ", and weight its in_features, ", sym_in_features(weights[0]), ", got shape ",
                      dy[i].sym_sizes(), " and in_features ", sym_in_features(weights[i]));
    kLinear.dtype(dy[i], "dy", dy[0].scalar_type(), "dy[0]");
    kLinear.device(dy[i], "dy", dy[0], "dy[0]");
  });
}

void pack_arguments(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2,
                    "pack_weight: weight must be 2-D (out_features×in_features), got shape ",
                    weight.sym_sizes());
  check_may_be_packed("pack_weight", weight);
  constexpr int64_t kRows = cpu::fused::kPanelRows;
  TORCH_CHECK_VALUE(weight.sym_size(0) % kRows == 0 && weight.sym_size(1) % 2 == 0,
                    "pack_weight: weight must have out_features in multiples of ", kRows,
                    " and in_features in multiples of 2, got shape ", weight.sym_sizes());
}

void packed_weight(const char* op, const Tensor& packed) {
  check_may_be_packed(op, packed);
  const int64_t width = cpu::fused::kPanelRows * neighbours_in_panels(packed.scalar_type());
  TORCH_CHECK_VALUE(packed.dim() == 3 && packed.sym_size(2) == width, op, ": a packed weight in ",
                    dtype_name(packed.scalar_type()), " must be out_features/32 × in_features/",
                    width / cpu::fused::kPanelRows, " × ", width,
                    ", as pack_weight makes it, got shape ", packed.sym_sizes());
  TORCH_CHECK_VALUE(packed.is_contiguous(), op,
                    ": a packed weight must be contiguous, got strides ", packed.sym_strides());
}

void mask_arguments(const Tensor& seed, const c10::SymInt& rows, const c10::SymInt& columns,
                    double p, const c10::SymInt& row_offset, const c10::SymInt& column_offset) {
  kMask.seed(seed);
  kMask.probability(p, "p");
  const auto check_count = [](const c10::SymInt& n, const char* name) {
    TORCH_CHECK_VALUE(n >= 0, "dropout_mask: ", name, " must be ≥ 0, got ", n);
  };
  check_count(rows, "rows");
  check_count(columns, "columns");
  check_count(row_offset, "row_offset");
  check_count(column_offset, "column_offset");
}

}  // namespace fused_lora::checks
