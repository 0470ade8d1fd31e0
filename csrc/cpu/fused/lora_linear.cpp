// Calls as products, and products as tasks.
#include "cpu/fused/lora_linear.h"

#include <algorithm>
#include <array>
#include <span>
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

// A thread's own, for blocks.
void* thread_scratch(int64_t bytes) {
  thread_local Kept memory;
  return memory.of(bytes);
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

// A block of a product's output, and whose it is where the output is shared out evenly.
struct Task {
  const Product* product;
  Block block;
  int64_t thread;
};

// The blocks of products, a thread's after another's: so that a thread that takes a run of them has
// its part of each product, and the same rows of what they share.
std::vector<Task> tasks_of(std::span<const Product> products, int threads) {
  std::vector<Task> tasks;
  for (const Product& p : products) {
    if (p.rows <= 0 || p.columns <= 0) continue;
    const Cut cut = cut_for(p, is_small(work_of(p)) ? 1 : threads);
    for (int64_t t = 0; t < cut.tasks(); ++t) {
      const int64_t i = t / cut.column_blocks, j = t % cut.column_blocks;
      const Block block = {i * p.rows / cut.row_blocks, (i + 1) * p.rows / cut.row_blocks,
                           j * cut.columns, std::min(p.columns, (j + 1) * cut.columns)};
      tasks.push_back({&p, block, (2 * t + 1) * threads / (2 * cut.tasks())});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.thread < b.thread; });
  return tasks;
}

}  // namespace

void run_products(std::span<const Product> products, const Kernels& kernels,
                  const Parallel& parallel) {
  int64_t work = 0;
  for (const Product& p : products) work += work_of(p);
  const bool serial = parallel.run == nullptr || parallel.threads <= 1 || is_small(work);
  const std::vector<Task> tasks = tasks_of(products, serial ? 1 : parallel.threads);
  if (tasks.empty()) return;
  run_tasks(serial ? Parallel{} : parallel, static_cast<int64_t>(tasks.size()),
            [&](int64_t begin, int64_t end) {
              void* scratch = thread_scratch(kernels.scratch_bytes);
              for (int64_t i = begin; i < end; ++i) {
                const Task& task = tasks[static_cast<size_t>(i)];
                kernels.block(*task.product, task.block, scratch);
              }
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

// A and B as the products take them.
struct Factors {
  Operand a, b;
};

Factors factors(const Problem& p, const MatrixView& a, const MatrixView& b,
                const Kernels& kernels) {
  if (rank_dtype(p) == p.adapter_dtype) {
    return {operand(a, p.adapter_dtype), operand(b, p.adapter_dtype)};
  }
  thread_local Kept memory;
  const int64_t elements = p.rank * (p.in_features + p.out_features);
  auto* to = static_cast<uint16_t*>(memory.of(elements * static_cast<int64_t>(sizeof(uint16_t))));
  return {rounded(a, p.rank, p.in_features, kernels, to),
          rounded(b, p.out_features, p.rank, kernels, to + p.rank * p.in_features)};
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

Product rank_down(const Problem& p, const Operand& rows, int64_t depth, const Operand& factor,
                  float alpha, void* out) {
  Product product;
  product.rows = p.rows;
  product.columns = p.rank;
  product.depth = depth;
  product.left = rows;
  product.right = factor;
  product.alpha = alpha;
  product.out = {out, p.rank, 1, rank_dtype(p)};
  return product;
}

Product rank_grad(const Problem& p, const void* low, const Operand& rows, int64_t columns,
                  const Output& out) {
  Product product;
  product.rows = p.rank;
  product.columns = columns;
  product.depth = p.rows;
  product.left = {low, 1, p.rank, rank_dtype(p)};
  product.right = rows;
  product.out = out;
  return product;
}

Mask drawn_mask(const Problem& p, const Dropout& dropout, const Kernels& kernels,
                const Parallel& parallel, const int64_t* order) {
  if (!dropout.active()) return {};
  thread_local Kept memory;
  const int64_t row_stride = parts(p.in_features, kMaskColumns) * (kMaskColumns / 8);
  auto* bits = static_cast<uint8_t*>(memory.of(p.rows * row_stride));
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

void run(const ForwardCall& call, Level level, const Parallel& parallel) {
  const Problem& p = call.problem;
  const Kernels& kernels = kernels_of(level);
  const DType low = rank_dtype(p);
  const Factors factor = factors(p, call.lora_a, call.lora_b, kernels);

  Product h = rank_down(p, operand(call.x, p.dtype), p.in_features, transposed(factor.a),
                        call.scaling, call.h);
  mask(&h, MaskOn::kLeft, call.dropout, drawn_mask(p, call.dropout, kernels, parallel));
  run_product(h, kernels, parallel);

  Product y;
  y.rows = p.rows;
  y.columns = p.out_features;
  y.depth = p.in_features;
  y.left = operand(call.x, p.dtype);
  y.right = weight(p, call.weight, true);
  y.tail_depth = p.rank;
  y.tail_left = dense(call.h, p.rank, low);
  y.tail_right = transposed(factor.b);
  y.start = call.bias;
  y.start_dtype = p.dtype;
  y.out = {call.y, p.out_features, 1, p.dtype};
  run_product(y, kernels, parallel);
}

void run(const BackwardCall& call, Level level, const Parallel& parallel) {
  const Problem& p = call.problem;
  const Kernels& kernels = kernels_of(level);
  const DType low = rank_dtype(p);
  const Factors factor = factors(p, call.lora_a, call.lora_b, kernels);
  const Operand dy = operand(call.dy, p.dtype);
  const bool masked = call.dx != nullptr || call.dlora_a != nullptr;
  const Mask drawn = masked ? drawn_mask(p, call.dropout, kernels, parallel) : Mask{};

  Product g, db;
  if (call.dx != nullptr || call.dlora_a != nullptr) {
    g = rank_down(p, dy, p.out_features, factor.b, call.scaling, call.g);
  }
  if (call.dlora_b != nullptr) {
    db = rank_grad(p, call.h, dy, p.out_features, {call.dlora_b, 1, p.rank, p.adapter_dtype});
  }
  run_products(std::array{g, db}, kernels, parallel);

  Product dx, da;
  if (call.dx != nullptr) {
    dx.rows = p.rows;
    dx.columns = p.in_features;
    dx.depth = p.out_features;
    dx.left = dy;
    dx.right = weight(p, call.weight, false);
    dx.tail_depth = p.rank;
    dx.tail_left = dense(call.g, p.rank, low);
    dx.tail_right = factor.a;
    dx.out = {call.dx, p.in_features, 1, p.dtype};
    mask(&dx, MaskOn::kTail, call.dropout, drawn);
  }
  if (call.dlora_a != nullptr) {
    da = rank_grad(p, call.g, operand(call.x, p.dtype), p.in_features,
                   {call.dlora_a, p.in_features, 1, p.adapter_dtype});
    mask(&da, MaskOn::kRight, call.dropout, drawn);
  }
  run_products(std::array{dx, da}, kernels, parallel);
}

}  // namespace fused_lora::cpu::fused
