#include "torch/shape_class.h"

namespace fused_lora {
namespace {

int64_t next_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

const char* name(ClassDType dtype) {
  switch (dtype) {
    case ClassDType::kFloat32:
      return "float32";
    case ClassDType::kBFloat16:
      return "bfloat16";
    case ClassDType::kFloat64:
      return "float64";
    default:
      return "float16";
  }
}

const char* name(Layout layout) {
  switch (layout) {
    case Layout::kRows:
      return "rows";
    case Layout::kColumns:
      return "columns";
    case Layout::kNeither:
      return "neither";
    case Layout::kPanels:
      return "panels";
    default:
      return "absent";
  }
}

}  // namespace

Layout layout_of(const void* data, int64_t row_stride, int64_t column_stride, int64_t item_bytes) {
  constexpr int64_t kChunkBytes = 16;
  const auto in_chunks = [&](int64_t stride) {
    return stride * item_bytes % kChunkBytes == 0 &&
           reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0;
  };
  if (column_stride == 1 && in_chunks(row_stride)) return Layout::kRows;
  if (row_stride == 1 && in_chunks(column_stride)) return Layout::kColumns;
  return Layout::kNeither;
}

void ShapeClass::add_to(at::ScalarType dtype) {
  adds = true;
  weight = Layout::kAbsent;
  y_dtype = dtype == at::kFloat      ? ClassDType::kFloat32
            : dtype == at::kBFloat16 ? ClassDType::kBFloat16
            : dtype == at::kHalf     ? ClassDType::kFloat16
                                     : ClassDType::kFloat64;
}

std::string ShapeClass::text() const {
  std::string text = backward ? "backward" : "forward";
  const auto add = [&](const char* what, const std::string& value) {
    text.append(" ").append(what).append("=").append(value);
  };
  add("rows", std::to_string(next_power_of_two(rows)));
  add("in", std::to_string(in_features));
  add("out", std::to_string(out_features));
  add("rank", std::to_string(rank));
  if (mixed > 0) add("mixed", std::to_string(mixed));
  add("dtype", name(dtype));
  add("adapters", name(adapter_dtype));
  if (round_adapters) text += " rounded";
  if (allow_tf32) text += " tf32";
  if (dropout) text += " dropout";
  if (bias) text += " bias";
  if (needs_x) text += " dx";
  if (needs_a) text += " da";
  if (needs_b) text += " db";
  add(backward ? "dy" : "x", name(long_operand));
  if (needs_a) add("x", name(x));
  add("weight", name(weight));
  if (adds) add("adds", name(y_dtype));
  if (in_place) text += " in place";
  if (threads > 0) add("threads", std::to_string(threads));
  if (instructions != nullptr) text.append(" ").append(instructions);
  return text;
}

ShapeClass::Key ShapeClass::key() const {
  const std::array<bool, 10> flags = {backward, round_adapters, allow_tf32, dropout, bias,
                                      needs_x,  needs_a,        needs_b,    adds,    in_place};
  int64_t bits = 0;
  for (const bool flag : flags) bits = 2 * bits + (flag ? 1 : 0);
  const auto layouts = static_cast<int64_t>(y_dtype) << 24 |
                       static_cast<int64_t>(long_operand) << 16 | static_cast<int64_t>(x) << 8 |
                       static_cast<int64_t>(weight);
  return {static_cast<int64_t>(device.type()) << 16 | static_cast<uint8_t>(device.index()),
          threads,
          static_cast<int64_t>(reinterpret_cast<intptr_t>(instructions)),
          next_power_of_two(rows),
          in_features,
          out_features,
          rank,
          mixed,
          static_cast<int64_t>(dtype),
          static_cast<int64_t>(adapter_dtype),
          bits,
          layouts};
}

}  // namespace fused_lora
