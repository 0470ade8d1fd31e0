// How the binders pick a handler's instantiation by the type, and place its operands.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "arithmetic/rounding.h"
#include "core/binder.h"
#include "core/elementwise.h"

namespace emulator {

namespace detail {

template <class T, size_t>
using Repeat = T;

template <int N, class Op, class T, size_t... I>
constexpr Handler uniform(std::index_sequence<I...>) {
  return Packed<N, Op, T, Repeat<T, I>...>::run;
}

}  // namespace detail

// The handler of an Op whose destination and `Sources` sources all hold N elements of type T.
template <int N, class Op, class T, int Sources>
constexpr Handler uniform() {
  return detail::uniform<N, Op, T>(std::make_index_sequence<Sources>{});
}

// Calls `visit(T{})` with the unsigned word of the type's size; nullptr where there is none.
template <class Visit>
Handler for_words(const ptx::Type& type, Visit visit) {
  if (type.count != 1) return nullptr;
  if (type.bits == 16) return visit(uint16_t{});
  if (type.bits == 32) return visit(uint32_t{});
  if (type.bits == 64) return visit(uint64_t{});
  return nullptr;
}

// Calls `visit(T{})` with the host's integer type; nullptr for types that are no integers of 16 to
// 64 bits.
template <class Visit>
Handler for_integers(const ptx::Type& type, Visit visit) {
  if (type.cls == ptx::Type::Class::Unsigned) return for_words(type, visit);
  if (type.cls != ptx::Type::Class::Signed) return nullptr;
  return for_words(type, [&](auto word) { return visit(std::make_signed_t<decltype(word)>{}); });
}

// The same for instructions that do not care about the sign: the unsigned word of an integer type.
template <class Visit>
Handler for_integer_words(const ptx::Type& type, Visit visit) {
  const bool integer =
      type.cls == ptx::Type::Class::Unsigned || type.cls == ptx::Type::Class::Signed;
  return integer ? for_words(type, visit) : nullptr;
}

// Roots such as "add" that name instructions of several families: the binders of the other
// families.
void bind_floating(Binder& binder);
void bind_carry(Binder& binder);

// Whether the instruction works on numbers with a point: its last modifier tells.
inline bool is_floating(const Binder& binder) {
  ptx::Type type;
  const auto& modifiers = binder.instruction.modifiers;
  return !modifiers.empty() && ptx::parse_type(modifiers.back(), &type) && type.is_float();
}

// Consumes .rn, .rz, .rm or .rp; false where none comes next.
bool take_rounding(Binder& binder, Rounding* rounding);

// Ends the binding of an instruction: `run` on the destination and the sources, in the order of the
// text. Refuses a handler that is none, modifiers left over, and another number of operands.
inline void bind(Binder& binder, Handler run, const ptx::Type& d,
                 std::initializer_list<ptx::Type> sources) {
  if (run == nullptr) binder.unsupported("this form");
  binder.done();
  if (binder.operand_count() != static_cast<int>(sources.size()) + 1) {
    binder.unsupported(std::to_string(binder.operand_count()) + " operands");
  }
  Step& step = binder.step;
  step.run = run;
  step.slots = {binder.destination(0, d)};
  int i = 1;
  for (const ptx::Type& type : sources) step.slots.push_back(binder.source(i++, type));
}

constexpr ptx::Type kB32{ptx::Type::Class::Bits, 32, 1};
constexpr ptx::Type kB64{ptx::Type::Class::Bits, 64, 1};
constexpr ptx::Type kU32{ptx::Type::Class::Unsigned, 32, 1};
constexpr ptx::Type kPredicate{ptx::Type::Class::Predicate, 0, 1};

}  // namespace emulator
