// The calls that one choice of a path serves: the same but for the number of rows, which counts by
// powers of two.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace fused_lora {

// How an operand is read: by rows or columns of 16-byte chunks, or neither; or a weight in panels.
enum class Layout : uint8_t { kRows, kColumns, kNeither, kPanels, kAbsent };
Layout layout_of(const void* data, int64_t row_stride, int64_t column_stride, int64_t item_bytes);

// As every family of kernels numbers the dtypes it has. kFloat64: of what torch alone adds to.
enum class ClassDType : uint8_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct ShapeClass {
  c10::Device device = c10::kCPU;
  int threads = 0;                     // that a call on the CPU is cut for
  const char* instructions = nullptr;  // of the CPU's kernels: a literal
  bool backward = false;
  int64_t rows = 0, in_features = 0, out_features = 0, rank = 0;
  int64_t mixed = 0;  // adapters that the rows belong to; 0: all of them to one
  ClassDType dtype = ClassDType::kFloat32, adapter_dtype = ClassDType::kFloat32;
  bool round_adapters = false;
  bool allow_tf32 = false;
  bool dropout = false;
  bool bias = false;      // of a forward
  bool adds = false;      // to what the frozen layer gave: there is no product with W
  bool in_place = false;  // of such a forward
  ClassDType y_dtype = ClassDType::kFloat32;               // where it adds; else dtype
  bool needs_x = false, needs_a = false, needs_b = false;  // of a backward
  Layout long_operand = Layout::kRows;                     // x, or a backward's dy
  Layout x = Layout::kAbsent;                              // of a backward
  Layout weight = Layout::kRows;

  // Makes it the class of a call that adds to a y, or reads a dy, of this dtype.
  void add_to(at::ScalarType dtype);

  // Everything but the device, in words: how the class is known on disk.
  std::string text() const;

  using Key = std::array<int64_t, 12>;
  Key key() const;
};

// The descriptions of calls differ between the families of kernels in what they add, and agree in
// what is named here.

template <typename Call, typename View>
Layout layout_in(const Call& call, const View& view) {
  const int64_t bytes = static_cast<ClassDType>(call.problem.dtype) == ClassDType::kFloat32 ? 4 : 2;
  return layout_of(view.data, view.row_stride, view.column_stride, bytes);
}

template <typename Call>
ShapeClass class_of_any(const Call& call, c10::Device device) {
  const auto& p = call.problem;
  ShapeClass shape;
  shape.device = device;
  shape.rows = p.rows;
  shape.in_features = p.in_features;
  shape.out_features = p.out_features;
  shape.rank = p.rank;
  shape.dtype = static_cast<ClassDType>(p.dtype);
  shape.adapter_dtype = static_cast<ClassDType>(p.adapter_dtype);
  shape.round_adapters = p.round_adapters;
  if constexpr (requires { p.allow_tf32; }) shape.allow_tf32 = p.allow_tf32;
  shape.dropout = call.dropout.active();
  shape.weight = layout_in(call, call.weight);
  if constexpr (requires { p.weight_in_panels; }) {
    if (p.weight_in_panels) shape.weight = Layout::kPanels;
  }
  return shape;
}

template <typename ForwardCall>
ShapeClass forward_class(const ForwardCall& call, c10::Device device) {
  ShapeClass shape = class_of_any(call, device);
  shape.bias = call.bias != nullptr;
  shape.long_operand = layout_in(call, call.x);
  return shape;
}

// needed: dx, dlora_a, dlora_b. The call's own pointers to them are not looked at.
template <typename BackwardCall>
ShapeClass backward_class(const BackwardCall& call, const std::array<bool, 3>& needed,
                          c10::Device device) {
  ShapeClass shape = class_of_any(call, device);
  shape.backward = true;
  shape.needs_x = needed[0];
  shape.needs_a = needed[1];
  shape.needs_b = needed[2];
  shape.long_operand = layout_in(call, call.dy);
  if (shape.needs_a) shape.x = layout_in(call, call.x);
  return shape;
}

}  // namespace fused_lora
