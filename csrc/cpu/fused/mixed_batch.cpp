#include "cpu/fused/mixed_batch.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "cpu/fused/parallel.h"
#include "cpu/fused/products.h"

namespace fused_lora::cpu::fused {
namespace {

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

const char* at(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * size_of(dtype);
}

char* at(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}

Operand from_row(Operand operand, int64_t row) {
  operand.data = at(operand.data, row * operand.row_stride, operand.stored);
  return operand;
}

Mask from_row(Mask mask, int64_t row) {
  if (mask.bits != nullptr) mask.bits += row * mask.row_stride;
  return mask;
}

// Rows begin .. end-1 of the batch, in the order of a Grouping, and the adapter of all of them.
struct Segment {
  int64_t begin, end, adapter;

  int64_t rows() const { return end - begin; }
  bool adapted() const { return adapter >= 0; }
};

// The rows of a batch in such an order that those of an adapter are neighbours.
struct Grouping {
  std::vector<Segment> segments;
  std::vector<int64_t> moved;  // the order, where it is another than the rows'

  Grouping(const int64_t* adapter_of_row, int64_t rows, int64_t adapters) {
    std::vector<int64_t> runs(adapters, 0);
    bool apart = false;
    for (int64_t row = 0, end; row < rows; row = end) {
      const int64_t adapter = std::max<int64_t>(-1, adapter_of_row[row]);
      for (end = row + 1; end < rows && std::max<int64_t>(-1, adapter_of_row[end]) == adapter;) {
        ++end;
      }
      segments.push_back({row, end, adapter});
      apart |= adapter >= 0 && runs[adapter]++ > 0;
    }
    if (!apart) return;
    // By counting: those of none first.
    std::vector<int64_t> next(adapters + 2, 0);
    for (const Segment& run : segments) next[run.adapter + 2] += run.rows();
    for (int64_t i = 1; i < adapters + 2; ++i) next[i] += next[i - 1];
    std::vector<Segment> grouped;
    for (int64_t adapter = -1; adapter < adapters; ++adapter) {
      const Segment all = {next[adapter + 1], next[adapter + 2], adapter};
      if (all.rows() > 0) grouped.push_back(all);
    }
    moved.resize(rows);
    for (const Segment& run : segments) {
      for (int64_t row = run.begin; row < run.end; ++row) moved[next[run.adapter + 1]++] = row;
    }
    segments = std::move(grouped);
  }

  const int64_t* order() const { return moved.empty() ? nullptr : moved.data(); }
};

// Segments whose frozen product is one: a long one, or several short ones.
using Chunk = std::span<const Segment>;

int64_t rows_of(Chunk chunk) {
  return chunk.back().end - chunk.front().begin;
}

// columns: of the product. Several segments begin from what their adapters add, and rows that are
// gathered lie in, memory that is to stay small.
template <typename Visit>
void for_each_chunk(const Grouping& grouping, int64_t columns, const Visit& visit) {
  constexpr int64_t kElements = int64_t{1} << 20, kFewest = 64;
  const int64_t most =
      std::clamp(kElements / std::max<int64_t>(1, columns), kFewest, int64_t{kBlockRows});
  const std::vector<Segment>& segments = grouping.segments;
  for (auto first = segments.begin(); first != segments.end();) {
    if (grouping.order() != nullptr && first->rows() > most) {
      for (Segment part = {first->begin, 0, first->adapter}; part.begin < first->end;) {
        part.end = std::min(first->end, part.begin + most);
        visit(Chunk(&part, 1));
        part.begin = part.end;
      }
      ++first;
      continue;
    }
    auto last = first + 1;
    while (last != segments.end() && last->end - first->begin <= most) ++last;
    visit(Chunk(first, last));
    first = last;
  }
}

template <typename Body>
void for_rows(const Parallel& parallel, int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kElements = int64_t{1} << 16;  // worth a task
  const int64_t tasks = std::max<int64_t>(1, rows * columns / kElements);
  run_tasks(parallel, tasks, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * rows / tasks; row < end * rows / tasks; ++row) body(row);
  });
}

// Rows order[0] .. order[rows-1] of a matrix, dense.
Operand gathered(const Operand& from, const int64_t* order, int64_t rows, int64_t columns, void* to,
                 const Parallel& parallel) {
  const int64_t size = size_of(from.stored);
  for_rows(parallel, rows, columns, [&](int64_t i) {
    const char* row = at(from.data, order[i] * from.row_stride, from.stored);
    char* out = at(to, i * columns, from.stored);
    if (from.column_stride == 1) {
      std::memcpy(out, row, columns * size);
      return;
    }
    for (int64_t c = 0; c < columns; ++c) {
      std::memcpy(out + c * size, row + c * from.column_stride * size, size);
    }
  });
  return dense(to, columns, from.stored);
}

void scatter(const void* from, const int64_t* order, int64_t rows, int64_t columns, DType dtype,
             void* to, const Parallel& parallel) {
  for_rows(parallel, rows, columns, [&](int64_t i) {
    std::memcpy(at(to, order[i] * columns, dtype), at(from, i * columns, dtype),
                columns * size_of(dtype));
  });
}

// An adapter as the products take it.
struct Factors {
  Operand a, b;
  int64_t rank, begin;  // its ranks among all
  float scaling;
};

// What the two directions have in common.
class Batch {
 public:
  template <typename Call>
  Batch(const Call& call, Level level, const Parallel& parallel)
      : p_(call.problem),
        dropout_(call.dropout),
        kernels_(kernels_of(level)),
        parallel_(parallel),
        grouping_(call.adapter_of_row, p_.rows, call.adapter_count),
        low_(rank_dtype(p_)) {
    const bool rounds = low_ != p_.adapter_dtype;
    thread_local Kept memory;
    uint16_t* to = nullptr;
    if (rounds) {
      const int64_t elements = p_.rank * (p_.in_features + p_.out_features);
      to = static_cast<uint16_t*>(memory.of(2 * elements));
    }
    int64_t begin = 0;
    for (const Adapter& adapter : std::span(call.adapters, call.adapter_count)) {
      Factors made = {operand(adapter.a, p_.adapter_dtype), operand(adapter.b, p_.adapter_dtype),
                      adapter.rank, begin, adapter.scaling};
      if (rounds) {
        made.a = rounded(adapter.a, adapter.rank, p_.in_features, kernels_, to);
        to += adapter.rank * p_.in_features;
        made.b = rounded(adapter.b, p_.out_features, adapter.rank, kernels_, to);
        to += adapter.rank * p_.out_features;
      }
      factors_.push_back(made);
      begin += adapter.rank;
      widest_ = std::max(widest_, adapter.rank);
    }
  }

 protected:
  const Problem& p_;
  const Dropout& dropout_;
  const Kernels& kernels_;
  const Parallel& parallel_;
  const Grouping grouping_;
  const DType low_;
  std::vector<Factors> factors_;
  int64_t widest_ = 1;
  Mask drawn_;  // in the grouping's order

  const Factors& factors_of(const Segment& segment) const { return factors_[segment.adapter]; }

  Problem problem_of(const Segment& segment) const {
    Problem p = p_;
    p.rows = segment.rows();
    p.rank = factors_of(segment).rank;
    return p;
  }

  // h and g of a few rows lie as the ranks of their adapter, widest_ apart.
  Operand low(const void* data) const { return dense(data, widest_, low_); }
  int64_t low_bytes(int64_t rows) const { return rows * widest_ * size_of(low_); }

  // A chunk's frozen product, each row with the low-rank product of its adapter, which is summed
  // with it where that is the same for all rows, and else comes first.
  //
  // low_rows: the chunk's h or g. up: of an adapter, what it is multiplied by.
  template <typename Up>
  void run_chunk(Product frozen, Chunk chunk, const Operand& low_rows, MaskOn where,
                 const Up& up) const {
    const int64_t first = chunk.front().begin;
    frozen.rows = rows_of(chunk);
    const auto add_tail_of = [&](Product& product, const Segment& segment) {
      if (!segment.adapted()) return;
      const Factors& factors = factors_of(segment);
      add_tail(&product, factors.rank, from_row(low_rows, segment.begin - first), up(factors));
      if (where == MaskOn::kTail) {
        mask(&product, where, dropout_, from_row(drawn_, segment.begin));
      }
    };
    if (chunk.size() == 1) {
      add_tail_of(frozen, chunk.front());
      run_product(frozen, kernels_, parallel_);
      return;
    }
    thread_local Kept memory;
    const int64_t stride = (frozen.columns + kColumnStep - 1) / kColumnStep * kColumnStep;
    auto* start = static_cast<float*>(memory.of(4 * frozen.rows * stride));
    std::vector<Product> starts;
    for (const Segment& segment : chunk) {
      Product product;
      product.rows = segment.rows();
      product.columns = frozen.columns;
      product.left.stored = product.right.stored = low_;
      product.start = frozen.start;
      product.start_dtype = frozen.start_dtype;
      add_tail_of(product, segment);
      product.out = {start + (segment.begin - first) * stride, stride, 1, DType::kFloat32};
      starts.push_back(product);
    }
    run_products(starts, kernels_, parallel_);
    frozen.start = start;
    frozen.start_dtype = DType::kFloat32;
    frozen.start_row_stride = stride;
    run_product(frozen, kernels_, parallel_);
  }
};

class Forward : Batch {
 public:
  Forward(const MixedForwardCall& call, Level level, const Parallel& parallel)
      : Batch(call, level, parallel), call_(call) {
    drawn_ = drawn_mask(p_, dropout_, kernels_, parallel_, grouping_.order());
  }

  void operator()() const {
    for_each_chunk(grouping_, p_.out_features, [&](Chunk chunk) { run(chunk); });
  }

 private:
  const MixedForwardCall& call_;

  void run(Chunk chunk) const {
    thread_local Kept low_memory, x_memory, y_memory;
    const int64_t first = chunk.front().begin, rows = rows_of(chunk);
    const int64_t* order = grouping_.order() ? grouping_.order() + first : nullptr;
    Operand x = operand(call_.x, p_.dtype);
    void* y = at(call_.y, first * p_.out_features, p_.dtype);
    if (order != nullptr) {
      const int64_t size = size_of(p_.dtype);
      x = gathered(x, order, rows, p_.in_features, x_memory.of(rows * p_.in_features * size),
                   parallel_);
      y = y_memory.of(rows * p_.out_features * size);
    } else {
      x = from_row(x, first);
    }

    void* h = low_memory.of(low_bytes(rows));
    run_down(chunk, x, h);
    keep(chunk, h, order);

    run_chunk(frozen_forward(p_, x, call_.weight, call_.bias, y), chunk, low(h), MaskOn::kNothing,
              [](const Factors& factors) { return transposed(factors.b); });
    if (order != nullptr) scatter(y, order, rows, p_.out_features, p_.dtype, call_.y, parallel_);
  }

  void run_down(Chunk chunk, const Operand& x, void* h) const {
    std::vector<Product> products;
    for (const Segment& segment : chunk) {
      if (!segment.adapted()) continue;
      const int64_t row = segment.begin - chunk.front().begin;
      const Factors& factors = factors_of(segment);
      products.push_back(rank_down(problem_of(segment), from_row(x, row), p_.in_features,
                                   transposed(factors.a), factors.scaling,
                                   {at(h, row * widest_, low_), widest_, 1, low_}));
      mask(&products.back(), MaskOn::kLeft, dropout_, from_row(drawn_, segment.begin));
    }
    run_products(products, kernels_, parallel_);
  }

  // Writes a chunk's h to where the call wants it.
  void keep(Chunk chunk, const void* h, const int64_t* order) const {
    const int64_t first = chunk.front().begin, size = size_of(low_);
    for (const Segment& segment : chunk) {
      const int64_t begin = segment.adapted() ? factors_of(segment).begin : 0;
      const int64_t rank = segment.adapted() ? factors_of(segment).rank : 0;
      for (int64_t row = segment.begin; row < segment.end; ++row) {
        char* to = at(call_.h, (order ? order[row - first] : row) * p_.rank, low_);
        std::memset(to, 0, begin * size);
        std::memcpy(to + begin * size, at(h, (row - first) * widest_, low_), rank * size);
        std::memset(to + (begin + rank) * size, 0, (p_.rank - begin - rank) * size);
      }
    }
  }
};

class Backward : Batch {
 public:
  Backward(const MixedBackwardCall& call, Level level, const Parallel& parallel)
      : Batch(call, level, parallel),
        call_(call),
        adapters_(call.adapters, call.adapter_count),
        needs_x_(call.dx != nullptr),
        needs_a_(std::ranges::any_of(adapters_, [](const Adapter& a) { return a.da != nullptr; })),
        needs_b_(std::ranges::any_of(adapters_, [](const Adapter& a) { return a.db != nullptr; })) {
    if (needs_x_ || needs_a_) {
      drawn_ = drawn_mask(p_, dropout_, kernels_, parallel_, grouping_.order());
    }
  }

  void operator()() const {
    Kept dy_memory, x_memory, h_memory;
    const Operand dy = in_order(operand(call_.dy, p_.dtype), p_.out_features, &dy_memory);
    thread_local Kept g_memory;
    void* g = nullptr;
    if (needs_x_ || needs_a_) {
      g = g_memory.of(low_bytes(p_.rows));
      run_down(dy, g);
    }
    if (needs_b_) {
      run_db(dy, in_order(dense(call_.h, p_.rank, low_), p_.rank, &h_memory));
    }
    if (needs_x_) {
      for_each_chunk(grouping_, p_.in_features, [&](Chunk chunk) { run_dx(chunk, dy, g); });
    }
    if (needs_a_) {
      run_da(in_order(operand(call_.x, p_.dtype), p_.in_features, &x_memory), g);
    }
    clear_unused();
  }

 private:
  const MixedBackwardCall& call_;
  const std::span<const Adapter> adapters_;
  const bool needs_x_, needs_a_, needs_b_;

  Operand in_order(const Operand& rows, int64_t columns, Kept* memory) const {
    if (grouping_.order() == nullptr) return rows;
    void* to = memory->of(p_.rows * columns * size_of(rows.stored));
    return gathered(rows, grouping_.order(), p_.rows, columns, to, parallel_);
  }

  void run_down(const Operand& dy, void* g) const {
    std::vector<Product> products;
    for (const Segment& segment : grouping_.segments) {
      if (!segment.adapted() || (!needs_x_ && adapters_[segment.adapter].da == nullptr)) continue;
      const Factors& factors = factors_of(segment);
      products.push_back(rank_down(problem_of(segment), from_row(dy, segment.begin),
                                   p_.out_features, factors.b, factors.scaling,
                                   {at(g, segment.begin * widest_, low_), widest_, 1, low_}));
    }
    run_products(products, kernels_, parallel_);
  }

  void run_dx(Chunk chunk, const Operand& dy, const void* g) const {
    thread_local Kept memory;
    const int64_t first = chunk.front().begin, rows = rows_of(chunk);
    const int64_t* order = grouping_.order();
    void* dx = at(call_.dx, first * p_.in_features, p_.dtype);
    if (order != nullptr) dx = memory.of(rows * p_.in_features * size_of(p_.dtype));
    run_chunk(frozen_backward(p_, from_row(dy, first), call_.weight, dx), chunk,
              from_row(low(g), first), MaskOn::kTail,
              [](const Factors& factors) { return factors.a; });
    if (order != nullptr) {
      scatter(dx, order + first, rows, p_.in_features, p_.dtype, call_.dx, parallel_);
    }
  }

  void run_da(const Operand& x, const void* g) const {
    std::vector<Product> products;
    for (const Segment& segment : grouping_.segments) {
      if (!segment.adapted() || adapters_[segment.adapter].da == nullptr) continue;
      products.push_back(rank_grad(
          problem_of(segment), from_row(low(g), segment.begin), from_row(x, segment.begin),
          p_.in_features, {adapters_[segment.adapter].da, p_.in_features, 1, p_.adapter_dtype}));
      mask(&products.back(), MaskOn::kRight, dropout_, from_row(drawn_, segment.begin));
    }
    run_products(products, kernels_, parallel_);
  }

  void run_db(const Operand& dy, const Operand& h) const {
    std::vector<Product> products;
    for (const Segment& segment : grouping_.segments) {
      if (!segment.adapted() || adapters_[segment.adapter].db == nullptr) continue;
      const Factors& factors = factors_of(segment);
      products.push_back(
          rank_grad(problem_of(segment),
                    dense(at(h.data, segment.begin * p_.rank + factors.begin, low_), p_.rank, low_),
                    from_row(dy, segment.begin), p_.out_features,
                    {adapters_[segment.adapter].db, 1, factors.rank, p_.adapter_dtype}));
    }
    run_products(products, kernels_, parallel_);
  }

  // An adapter without rows has gradients of zeros.
  void clear_unused() const {
    std::vector<bool> used(adapters_.size(), false);
    for (const Segment& segment : grouping_.segments) {
      if (segment.adapted()) used[segment.adapter] = true;
    }
    for (size_t i = 0; i < adapters_.size(); ++i) {
      if (used[i]) continue;
      const int64_t size = factors_[i].rank * size_of(p_.adapter_dtype);
      if (adapters_[i].da != nullptr) std::memset(adapters_[i].da, 0, size * p_.in_features);
      if (adapters_[i].db != nullptr) std::memset(adapters_[i].db, 0, size * p_.out_features);
    }
  }
};

}  // namespace

void run(const MixedForwardCall& call, Level level, const Parallel& parallel) {
  Forward(call, level, parallel)();
}

void run(const MixedBackwardCall& call, Level level, const Parallel& parallel) {
  Backward(call, level, parallel)();
}

}  // namespace fused_lora::cpu::fused
