#include "composed/mixed_batch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "composed/composed.h"
#include "composed/shapes.h"

namespace fused_lora::composed {
namespace {

// The rows of one adapter in a block of rows. On the CPU they are taken out; elsewhere the others
// are set to zero, since a device that is asked which rows they are makes the host wait.
class RowsOf {
 public:
  RowsOf(const at::Tensor& index, int64_t adapter) : on_cpu_(index.is_cpu()) {
    const at::Tensor mask = index == adapter;
    rows_ = on_cpu_ ? mask.nonzero().squeeze(1) : mask.unsqueeze(1);
  }

  bool none() const { return on_cpu_ && rows_.size(0) == 0; }

  at::Tensor take(const at::Tensor& block) const {
    return on_cpu_ ? block.index_select(0, rows_) : masked(block);
  }

  // Adds what was made of rows that were taken. into: the block, or columns of it.
  void add(const at::Tensor& into, const at::Tensor& made) const {
    const at::Tensor rows = made.to(into.scalar_type());
    if (on_cpu_) {
      into.index_add_(0, rows_, rows);
    } else {
      into.add_(masked(rows));
    }
  }

 private:
  bool on_cpu_;
  at::Tensor rows_;

  // Not by a product: others' zeros times a number that is not finite are none.
  at::Tensor masked(const at::Tensor& block) const {
    return at::where(rows_, block, at::zeros({}, block.options()));
  }
};

struct RankWindow {
  int64_t begin, size;

  at::Tensor of(const at::Tensor& low) const { return low.narrow(1, begin, size); }
};

// Calls body(adapter, its rows, its ranks) for the adapters of the rows that index has.
template <typename Body>
void for_each_adapter(const MixedAdapters& adapters, const at::Tensor& index, const Body& body) {
  int64_t begin = 0;
  for (int64_t i = 0; i < adapters.count(); ++i) {
    const RankWindow ranks = {begin, adapters.a[i].size(0)};
    begin += ranks.size;
    const RowsOf rows(index, i);
    if (!rows.none()) body(i, rows, ranks);
  }
}

std::vector<at::Tensor> in_dtype(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> all;
  for (const at::Tensor& one : tensors) all.push_back(one.to(dtype));
  return all;
}

bool any(const std::vector<bool>& flags) {
  return std::find(flags.begin(), flags.end(), true) != flags.end();
}

}  // namespace

bool MixedNeeded::any_a() const {
  return any(a);
}

bool MixedNeeded::any_b() const {
  return any(b);
}

at::Tensor index_of_rows(const at::Tensor& index, const at::Tensor& rows) {
  at::DimVector sizes(rows.sizes().begin(), rows.sizes().end() - 1);
  if (index.dim() == static_cast<int64_t>(sizes.size())) return index.reshape({-1});
  at::Tensor spread = index;
  for (auto d = index.dim(); d < static_cast<int64_t>(sizes.size()); ++d) {
    spread = spread.unsqueeze(-1);
  }
  return spread.expand(sizes).reshape({-1});
}

std::tuple<at::Tensor, at::Tensor> mixed_forward(const at::Tensor& x, const at::Tensor& weight,
                                                 const MixedAdapters& adapters,
                                                 const std::optional<at::Tensor>& bias,
                                                 const Dropout& dropout, bool round_adapters) {
  const auto low = rank_dtype(x, adapters.a[0], round_adapters);
  const at::Tensor matrix = as_matrix(x);
  const Rows rows(matrix, low, &dropout);
  const auto a = in_dtype(adapters.a, low), b = in_dtype(adapters.b, low);
  at::Tensor y = bias ? at::addmm(*bias, matrix, weight.t()) : at::mm(matrix, weight.t());
  at::Tensor h = at::zeros({rows.count(), adapters.ranks()}, matrix.options().dtype(low));
  const auto block = [&](int64_t row, int64_t n) {
    const at::Tensor part = rows.block(row, n), y_part = y.narrow(0, row, n);
    const at::Tensor h_part = h.narrow(0, row, n);
    for_each_adapter(adapters, adapters.index.narrow(0, row, n),
                     [&](int64_t i, const RowsOf& own, const RankWindow& ranks) {
                       const at::Tensor made =
                           at::mm(own.take(part), a[i].t()) * (adapters.scaling[i] * rows.scale());
                       own.add(ranks.of(h_part), made);
                       own.add(y_part, at::mm(made, b[i].t()));
                     });
  };
  for_each_row_block(x.device(), rows.count(), rows.columns(), rows.as_it_lies(), block);
  return {x.dim() == 2 ? y : y.view(with_last_size(x, weight.size(0))), h};
}

MixedGradients mixed_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                              const at::Tensor& weight, const MixedAdapters& adapters,
                              const std::optional<at::Tensor>& h, const Dropout& dropout,
                              bool round_adapters, const MixedNeeded& needed) {
  const auto low = rank_dtype(dy, adapters.a[0], round_adapters);
  const auto wide = at::promoteTypes(at::kFloat, low);
  const at::Tensor dy_matrix = as_matrix(dy);
  const Rows dy_rows(dy_matrix, low);
  const bool reads_x = needed.any_a() || (needed.any_b() && !h);
  const at::Tensor x_matrix = reads_x || needed.weight ? as_matrix(*x) : at::Tensor();
  const Rows x_rows(x_matrix, low, &dropout);
  const int64_t m = dy_rows.count(), in_features = adapters.a[0].size(1);
  const double scale = dropout.scale;
  const auto a = in_dtype(adapters.a, low), b = in_dtype(adapters.b, low);

  MixedGradients made;
  made.a.resize(adapters.count());
  made.b.resize(adapters.count());
  const auto zeros = [&](const at::Tensor& like) {
    return at::zeros(like.sizes(), like.options().dtype(wide));
  };
  for (int64_t i = 0; i < adapters.count(); ++i) {
    if (needed.a[i]) made.a[i] = zeros(adapters.a[i]);
    if (needed.b[i]) made.b[i] = zeros(adapters.b[i]);
  }
  if (needed.x) made.x = at::mm(dy_matrix, weight);

  const auto block = [&](int64_t row, int64_t n) {
    const at::Tensor dy_part = dy_rows.block(row, n);
    const at::Tensor x_part = reads_x ? x_rows.block(row, n) : at::Tensor();
    const at::Tensor h_part = h ? h->narrow(0, row, n) : at::Tensor();
    at::Tensor mask;
    if (needed.x && dropout.active()) mask = dropout.mask(row, n, in_features, low);
    const auto visit = [&](int64_t i, const RowsOf& own, const RankWindow& ranks) {
      const at::Tensor dy_own = own.take(dy_part), x_own = reads_x ? own.take(x_part) : x_part;
      if (needed.b[i]) {
        const at::Tensor h_own = h ? own.take(ranks.of(h_part))
                                   : at::mm(x_own, a[i].t()) * (adapters.scaling[i] * scale);
        made.b[i].add_(at::mm(dy_own.t(), h_own));
      }
      if (!needed.x && !needed.a[i]) return;
      const at::Tensor g = at::mm(dy_own, b[i]) * adapters.scaling[i];
      if (needed.a[i]) made.a[i].add_(at::mm(g.t(), x_own) * scale);
      if (needed.x) {
        at::Tensor delta = at::mm(g, a[i]);
        if (mask.defined()) delta = delta * own.take(mask) * scale;
        own.add(made.x.narrow(0, row, n), delta);
      }
    };
    for_each_adapter(adapters, adapters.index.narrow(0, row, n), visit);
  };
  if (needed.x || needed.any_a() || needed.any_b()) {
    const bool whole = dy_rows.as_it_lies() && (!reads_x || x_rows.as_it_lies());
    const int64_t widest = std::max(dy_rows.columns(), in_features);
    for_each_row_block(dy.device(), m, widest, whole && !dropout.active(), block);
  }

  for (at::Tensor& da : made.a) {
    if (da.defined()) da = da.to(adapters.a[0].scalar_type());
  }
  for (at::Tensor& db : made.b) {
    if (db.defined()) db = db.to(adapters.b[0].scalar_type());
  }
  if (needed.x) made.x = made.x.view(with_last_size(dy, in_features));
  if (needed.weight) made.weight = at::mm(dy_matrix.t(), x_matrix);
  if (needed.bias) made.bias = dy_matrix.sum(0);
  return made;
}

}  // namespace fused_lora::composed
