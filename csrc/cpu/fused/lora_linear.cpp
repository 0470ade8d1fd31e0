// Calls as products, and products as tasks.
#include "cpu/fused/lora_linear.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory_resource>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/fused/parallel.h"
#include "cpu/fused/products.h"

namespace fused_lora::cpu::fused {

const Kernels& kernels_of(Level level) {
#if defined(FUSED_LORA_X86_LEVELS)
  switch (level) {
    case Level::kPlain:
      break;
    case Level::kAvx2:
      return kernels_avx2();
    case Level::kAvx512:
      return kernels_avx512();
    case Level::kAvx512Bf16:
      return kernels_avx512_bf16();
  }
#else
  (void)level;
#endif
  return kernels_plain();
}

namespace {

// The calling thread's own: for blocks, for factors in another dtype, and for masks.
void* thread_scratch(int64_t bytes) {
  thread_local Kept memory;
  return memory.of(bytes);
}
uint16_t* factor_memory(int64_t elements) {
  thread_local Kept memory;
  return static_cast<uint16_t*>(memory.of(elements * static_cast<int64_t>(sizeof(uint16_t))));
}
uint8_t* mask_memory(int64_t bytes) {
  thread_local Kept memory;
  return static_cast<uint8_t*>(memory.of(bytes));
}

int64_t parts(int64_t whole, int64_t part) {
  return (whole + part - 1) / part;
}

// How a product's output is cut into blocks of nearly the same size. Every element is summed in the
// same order however it is cut, so the cut may follow the number of threads.
struct Cut {
  int64_t row_blocks, columns, column_blocks;

  int64_t tasks() const { return row_blocks * column_blocks; }
};

Cut cut_for(const Product& p, int threads) {
  // Below this many rows laying out the panels is no longer small beside the work. More than the
  // levels call few, too: how few rows are summed is not a matter of the cut.
  constexpr int64_t kFewestRows = 64;
  const int64_t rows_for = std::min<int64_t>(threads, p.rows / (2 * kFewestRows));
  const bool by_rows = rows_for == threads;
  Cut cut = {};
  // Every thread gets as many blocks as any other: of rows, or where they are few, of columns.
  cut.row_blocks = parts(p.rows, kBlockRows);
  if (by_rows) cut.row_blocks = parts(cut.row_blocks, threads) * threads;
  int64_t blocks = parts(p.columns, p.rows <= kFewRows ? kFewColumns : kBlockColumns);
  if (!by_rows) blocks = parts(blocks, threads) * threads;
  cut.columns = parts(parts(p.columns, blocks), kColumnStep) * kColumnStep;
  cut.column_blocks = parts(p.columns, cut.columns);
  // Thin outputs of many rows, then.
  if (!by_rows && cut.tasks() < threads && p.rows >= 2 * kFewestRows) {
    cut.row_blocks = std::max(cut.row_blocks, p.rows / kFewestRows);
  }
  return cut;
}

// Small enough to be done before a second thread has begun: in a few microseconds.
bool is_small(int64_t work) {
  return work < int64_t{1} << 18;
}

int64_t work_of(const Product& p) {
  return p.rows * p.columns * (p.depth + p.tail_depth);
}

// A block of an output, the products that are computed of it, one after the other, and whose it is
// where the output is shared out evenly.
struct Task {
  std::span<const Product> products;
  Block block;
  int64_t thread;
};

// Calls visit(task) for the blocks of every output.
template <typename Visit>
void for_each_task(std::span<const Product> products, int threads, const Visit& visit) {
  for (size_t first = 0, next; first < products.size(); first = next) {
    for (next = first + 1; next < products.size() && products[next].follows;) ++next;
    const Product& p = products[first];
    if (p.rows <= 0 || p.columns <= 0) continue;
    const Cut cut = cut_for(p, is_small(work_of(p)) ? 1 : threads);
    for (int64_t t = 0; t < cut.tasks(); ++t) {
      const int64_t i = t / cut.column_blocks, j = t % cut.column_blocks;
      const Block block = {i * p.rows / cut.row_blocks, (i + 1) * p.rows / cut.row_blocks,
                           j * cut.columns, std::min(p.columns, (j + 1) * cut.columns)};
      const int64_t thread = (2 * t + 1) * threads / (2 * cut.tasks());
      visit(Task{products.subspan(first, next - first), block, thread});
    }
  }
}

void compute(const Task& task, const Kernels& kernels, void* scratch) {
  for (const Product& p : task.products) kernels.block(p, task.block, scratch);
}

}  // namespace

void run_products(std::span<const Product> products, const Kernels& kernels,
                  const Parallel& parallel) {
  int64_t work = 0;
  for (const Product& p : products) work += work_of(p);
  if (parallel.run == nullptr || parallel.threads <= 1 || is_small(work)) {
    void* scratch = thread_scratch(kernels.scratch_bytes);
    for_each_task(products, 1, [&](const Task& task) { compute(task, kernels, scratch); });
    return;
  }
  // A thread's after another's: so that a thread that takes a run of them has its part of each
  // output, and the same rows of what they share.
  std::vector<Task> tasks;
  for_each_task(products, parallel.threads, [&](const Task& task) { tasks.push_back(task); });
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.thread < b.thread; });
  run_tasks(parallel, static_cast<int64_t>(tasks.size()), [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(kernels.scratch_bytes);
    for (int64_t i = begin; i < end; ++i) compute(tasks[static_cast<size_t>(i)], kernels, scratch);
  });
}

void run_product(const Product& product, const Kernels& kernels, const Parallel& parallel) {
  run_products({&product, 1}, kernels, parallel);
}

Operand operand(const MatrixView& view, DType dtype) {
  return {view.data, view.row_stride, view.column_stride, dtype};
}

Operand dense(const void* data, int64_t columns, DType dtype) {
  return {data, columns, 1, dtype};
}

Operand transposed(Operand strided) {
  std::swap(strided.row_stride, strided.column_stride);
  return strided;
}

Operand rounded(const MatrixView& view, int64_t rows, int64_t columns, const Kernels& kernels,
                uint16_t* to) {
  if (view.column_stride != 1 && view.row_stride == 1) {
    return transposed(rounded(view.transposed(), columns, rows, kernels, to));
  }
  const auto* from = static_cast<const float*>(view.data);
  for (int64_t i = 0; i < rows; ++i) {
    kernels.round(from + i * view.row_stride, view.column_stride, columns, to + i * columns);
  }
  return dense(to, columns, DType::kBFloat16);
}

namespace {

// The lists of what a few calls are made of, without memory of the heap.
class ListMemory {
 public:
  template <typename T>
  std::pmr::vector<T> list(size_t most) {
    std::pmr::vector<T> made(&resource_);
    made.reserve(most);
    return made;
  }

 private:
  static constexpr size_t kBytes = 4096;
  alignas(std::max_align_t) std::byte here_[kBytes];
  std::pmr::monotonic_buffer_resource resource_{here_, kBytes};
};

// A and B as the products take them.
struct Factors {
  Operand a, b;
};

bool rounds_factors(const Problem& p) {
  return rank_dtype(p) != p.adapter_dtype;
}

// Of each call.
template <typename Call>
std::pmr::vector<Factors> factors(std::span<const Call> calls, const Kernels& kernels,
                                  ListMemory* memory) {
  const auto elements = [](const Problem& p) {
    return rounds_factors(p) ? p.rank * (p.in_features + p.out_features) : 0;
  };
  int64_t all = 0;
  for (const Call& call : calls) all += elements(call.problem);
  uint16_t* to = factor_memory(all);
  auto made = memory->list<Factors>(calls.size());
  for (const Call& call : calls) {
    const auto& [p, a, b] = std::tie(call.problem, call.lora_a, call.lora_b);
    if (!rounds_factors(p)) {
      made.push_back({operand(a, p.adapter_dtype), operand(b, p.adapter_dtype)});
      continue;
    }
    made.push_back({rounded(a, p.rank, p.in_features, kernels, to),
                    rounded(b, p.out_features, p.rank, kernels, to + p.rank * p.in_features)});
    to += elements(p);
  }
  return made;
}

}  // namespace

Operand weight(const Problem& p, const MatrixView& view, bool transposed) {
  if (!p.weight_in_panels) {
    return operand(transposed ? view.transposed() : view, p.dtype);
  }
  const int64_t panel = kPanelRows * p.in_features;
  if (transposed) return {view.data, 0, panel, p.dtype, Layout::kPanels};
  return {view.data, panel, 0, p.dtype, Layout::kPanelsTransposed};
}

Product frozen_forward(const Problem& p, const Operand& x, const MatrixView& weight_view,
                       const void* bias, void* y) {
  Product product;
  product.rows = p.rows;
  product.columns = p.out_features;
  product.depth = p.in_features;
  product.left = x;
  product.right = weight(p, weight_view, true);
  product.start = bias;
  product.start_dtype = p.dtype;
  product.out = {y, p.out_features, 1, p.dtype};
  return product;
}

Product frozen_backward(const Problem& p, const Operand& dy, const MatrixView& weight_view,
                        void* dx) {
  Product product;
  product.rows = p.rows;
  product.columns = p.in_features;
  product.depth = p.out_features;
  product.left = dy;
  product.right = weight(p, weight_view, false);
  product.out = {dx, p.in_features, 1, p.dtype};
  return product;
}

void add_tail(Product* product, int64_t rank, const Operand& low, const Operand& factor) {
  product->tail_depth = rank;
  product->tail_left = low;
  product->tail_right = factor;
}

Product rank_down(const Problem& p, const Operand& rows, int64_t depth, const Operand& factor,
                  float alpha, const Output& out) {
  Product product;
  product.rows = p.rows;
  product.columns = p.rank;
  product.depth = depth;
  product.left = rows;
  product.right = factor;
  product.alpha = alpha;
  product.out = out;
  return product;
}

Product rank_grad(const Problem& p, const Operand& low, const Operand& rows, int64_t columns,
                  const Output& out) {
  Product product;
  product.rows = p.rank;
  product.columns = columns;
  product.depth = p.rows;
  product.left = transposed(low);
  product.right = rows;
  product.out = out;
  return product;
}

namespace {

int64_t mask_stride(const Problem& p) {
  return parts(p.in_features, kMaskColumns) * (kMaskColumns / 8);
}

Mask draw_mask(const Problem& p, const Dropout& dropout, const Kernels& kernels,
               const Parallel& parallel, const int64_t* order, uint8_t* bits) {
  const int64_t row_stride = mask_stride(p);
  // A draw of a row takes microseconds at most.
  constexpr int64_t kWorthThreads = int64_t{1} << 16;
  const int64_t tasks = parts(p.rows * p.in_features, kWorthThreads);
  run_tasks(parallel, tasks, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * p.rows / tasks, last = end * p.rows / tasks;
    if (order == nullptr) {
      kernels.draw(dropout, first, last, p.in_features, bits, row_stride);
      return;
    }
    // Where neighbours stay neighbours they are drawn together.
    for (int64_t i = first, next; i < last; i = next) {
      for (next = i + 1; next < last && order[next] == order[next - 1] + 1;) ++next;
      kernels.draw(dropout, order[i], order[i] + next - i, p.in_features,
                   bits + (i - order[i]) * row_stride, row_stride);
    }
  });
  return {bits, row_stride};
}

bool reads_mask(const ForwardCall& /*call*/) {
  return true;
}
bool reads_mask(const BackwardCall& call) {
  return call.dx != nullptr || call.dlora_a != nullptr;
}

// Of each call of one x.
template <typename Call>
std::pmr::vector<Mask> drawn_masks(std::span<const Call> calls, const Kernels& kernels,
                                   const Parallel& parallel, ListMemory* memory) {
  auto masks = memory->list<Mask>(calls.size());
  masks.resize(calls.size());
  const auto drops = [](const Call& call) { return call.dropout.active() && reads_mask(call); };
  const int64_t count = std::ranges::count_if(calls, drops);
  if (count == 0) return masks;
  const Problem& p = calls.front().problem;
  uint8_t* bits = mask_memory(count * p.rows * mask_stride(p));
  for (size_t i = 0; i < calls.size(); ++i) {
    if (!drops(calls[i])) continue;
    masks[i] = draw_mask(p, calls[i].dropout, kernels, parallel, nullptr, bits);
    bits += p.rows * mask_stride(p);
  }
  return masks;
}

}  // namespace

Mask drawn_mask(const Problem& p, const Dropout& dropout, const Kernels& kernels,
                const Parallel& parallel, const int64_t* order) {
  if (!dropout.active()) return {};
  return draw_mask(p, dropout, kernels, parallel, order, mask_memory(p.rows * mask_stride(p)));
}

void mask(Product* product, MaskOn where, const Dropout& dropout, const Mask& drawn) {
  if (!dropout.active()) return;
  product->mask = where;
  product->drawn = drawn;
  if (where == MaskOn::kTail) {
    product->tail_scale = dropout.scale;
  } else {
    product->alpha *= dropout.scale;
  }
}

bool supported(Level level) {
#if defined(FUSED_LORA_X86_LEVELS)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (level) {
    case Level::kPlain:
      return true;
    case Level::kAvx2:
      return avx2;
    case Level::kAvx512:
      return avx512;
    case Level::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return level == Level::kPlain;
}

Level best_level() {
  for (const Level level : {Level::kAvx512Bf16, Level::kAvx512, Level::kAvx2}) {
    if (supported(level)) return level;
  }
  return Level::kPlain;
}

namespace {

// The low-rank product by itself, formed in the way that suits its operands. out: M×columns, dense.
Product tail_alone(const Problem& p, int64_t columns, const Operand& left, const Operand& right,
                   void* out, DType dtype) {
  Product product;
  product.rows = p.rows;
  product.columns = columns;
  product.left = left;
  product.right = right;
  add_tail(&product, p.rank, left, right);
  product.out = {out, columns, 1, dtype};
  return product;
}

// h or g: M×r, in the rank dtype.
Operand low_of(const Problem& p, const void* data, int64_t stride) {
  return dense(data, stride == 0 ? p.rank : stride, rank_dtype(p));
}

}  // namespace

void run(std::span<const ForwardCall> calls, Level level, const Parallel& parallel) {
  const Kernels& kernels = kernels_of(level);
  ListMemory memory;
  const auto factor = factors(calls, kernels, &memory);
  const auto masks = drawn_masks(calls, kernels, parallel, &memory);
  auto hs = memory.list<Product>(calls.size()), ys = memory.list<Product>(calls.size());
  for (size_t i = 0; i < calls.size(); ++i) {
    const ForwardCall& call = calls[i];
    const Problem& p = call.problem;
    const Operand x = operand(call.x, p.dtype), low = low_of(p, call.h, call.h_stride);
    Product h = rank_down(p, x, p.in_features, transposed(factor[i].a), call.scaling,
                          {call.h, low.row_stride, 1, low.stored});
    mask(&h, MaskOn::kLeft, call.dropout, masks[i]);
    hs.push_back(h);

    Product y;
    if (call.base == nullptr) {
      y = frozen_forward(p, x, call.weight, call.bias, call.y);
      add_tail(&y, p.rank, low, transposed(factor[i].b));
    } else {
      y = tail_alone(p, p.out_features, low, transposed(factor[i].b), call.y, y_dtype(p));
      y.base = call.base;
      y.base_row_stride = call.base_stride;
    }
    ys.push_back(y);
  }
  run_products(hs, kernels, parallel);
  run_products(ys, kernels, parallel);
}

void run(std::span<const BackwardCall> calls, Level level, const Parallel& parallel) {
  const Kernels& kernels = kernels_of(level);
  ListMemory memory;
  const auto factor = factors(calls, kernels, &memory);
  const auto masks = drawn_masks(calls, kernels, parallel, &memory);
  const size_t n = calls.size();
  auto of_dy = memory.list<Product>(2 * n), of_g = memory.list<Product>(2 * n);
  for (size_t i = 0; i < calls.size(); ++i) {
    const BackwardCall& call = calls[i];
    const Problem& p = call.problem;
    const Operand dy = operand(call.dy, y_dtype(p)), g = low_of(p, call.g, 0);
    if (call.dx != nullptr || call.dlora_a != nullptr) {
      of_dy.push_back(rank_down(p, dy, p.out_features, factor[i].b, call.scaling,
                                {call.g, p.rank, 1, g.stored}));
    }
    if (call.dlora_b != nullptr) {
      of_dy.push_back(rank_grad(p, low_of(p, call.h, call.h_stride), dy, p.out_features,
                                {call.dlora_b, 1, p.rank, p.adapter_dtype}));
    }
    if (call.dx != nullptr) {
      Product dx;
      if (call.weight.data != nullptr) {
        dx = frozen_backward(p, dy, call.weight, call.dx);
        add_tail(&dx, p.rank, g, factor[i].a);
      } else {
        dx = tail_alone(p, p.in_features, g, factor[i].a, call.dx, p.dtype);
      }
      mask(&dx, MaskOn::kTail, call.dropout, masks[i]);
      dx.follows = !of_g.empty();  // the dx before it
      if (dx.follows) {
        dx.base = call.dx;
        dx.base_row_stride = p.in_features;
      }
      of_g.push_back(dx);
    }
  }
  for (size_t i = 0; i < n; ++i) {
    const BackwardCall& call = calls[i];
    const Problem& p = call.problem;
    if (call.dlora_a == nullptr) continue;
    Product da = rank_grad(p, low_of(p, call.g, 0), operand(call.x, p.dtype), p.in_features,
                           {call.dlora_a, p.in_features, 1, p.adapter_dtype});
    mask(&da, MaskOn::kRight, call.dropout, masks[i]);
    of_g.push_back(da);
  }
  run_products(of_dy, kernels, parallel);
  run_products(of_g, kernels, parallel);
}

}  // namespace fused_lora::cpu::fused
