// Extended-precision integer arithmetic (PTX ISA, "Extended-Precision Integer Arithmetic
// Instructions"): sums and differences that read or write the carry flag CC.CF, which every thread
// has one of.
#include "arithmetic/integer.h"
#include "instructions/select.h"

namespace emulator {
namespace {

using ptx::Type;

struct Sum {
  static constexpr int kSources = 2;
  template <class U>
  static U apply(U a, U b, U, bool carry_in, bool* carry_out) {
    const Wide<U> sum = Wide<U>{a} + b + carry_in;
    *carry_out = sum >> kBits<U> != 0;
    return static_cast<U>(sum);
  }
};

struct Difference {  // the flag is a borrow
  static constexpr int kSources = 2;
  template <class U>
  static U apply(U a, U b, U, bool borrow_in, bool* borrow_out) {
    *borrow_out = Wide<U>{b} + borrow_in > a;
    return static_cast<U>(a - b - borrow_in);
  }
};

struct LowProductSum {
  static constexpr int kSources = 3;
  template <class U>
  static U apply(U a, U b, U c, bool carry_in, bool* carry_out) {
    return Sum::apply(multiply_low(a, b), c, U{}, carry_in, carry_out);
  }
};

template <class Signed>
struct HighProductSum {
  static constexpr int kSources = 3;
  template <class U>
  static U apply(U a, U b, U c, bool carry_in, bool* carry_out) {
    using T = std::conditional_t<Signed::value, std::make_signed_t<U>, U>;
    const auto high = static_cast<U>(multiply_high(static_cast<T>(a), static_cast<T>(b)));
    return Sum::apply(high, c, U{}, carry_in, carry_out);
  }
};

// step.slots: the destination, the sources, the flag. immediate[0]: the flag is read; [1]: it is
// written.
template <class Op, class U>
void run(Warp& warp, const Step& step, LaneMask active) {
  const U* sources[3];
  LaneMask tainted = 0;
  for (int i = 0; i < 3; ++i) {
    const Slot& slot = step.slots[static_cast<size_t>(i < Op::kSources ? i + 1 : 1)];
    sources[i] = warp.lanes<U>(slot);
    tainted |= warp.tainted(slot);
  }
  const Slot& flag = step.slots.back();
  const bool reads = step.immediate[0] != 0;
  const LaneMask carries = reads ? warp.predicate(flag) : 0;
  if (reads) tainted |= warp.tainted(flag);

  U result[kLanes];
  LaneMask carried = 0;
  for (int l = 0; l < kLanes; ++l) {
    bool carry;
    result[l] =
        Op::apply(sources[0][l], sources[1][l], sources[2][l], (carries >> l & 1) != 0, &carry);
    carried |= LaneMask{carry} << l;
  }
  warp.store(step.slots[0], result, active);
  for_each_lane(tainted & active,
                [&](int l) { warp.set_undefined(step.slots[0], l, ~uint64_t{0}); });
  if (step.immediate[1] != 0) warp.store_predicate(flag, carried, active, tainted);
}

template <class Op>
Handler choose(const Type& type) {
  return for_integer_words(type, [](auto u) -> Handler {
    using U = decltype(u);
    if constexpr (sizeof(U) >= 4) return run<Op, U>;
    return nullptr;
  });
}

}  // namespace

// {add,sub}{c}{.cc}.type, mad{c}.{lo,hi}{.cc}.type
void bind_carry(Binder& b) {
  const std::string& root = b.instruction.root;
  const std::string operation = root.substr(0, 3);
  const bool low = operation == "mad" && b.take("lo");
  const bool high = operation == "mad" && !low && b.take("hi");
  const bool writes = b.take("cc");
  const Type type = b.type();
  Handler handler = nullptr;
  if (operation == "add") handler = choose<Sum>(type);
  if (operation == "sub") handler = choose<Difference>(type);
  if (low) handler = choose<LowProductSum>(type);
  if (high) {
    handler = type.is_signed() ? choose<HighProductSum<std::true_type>>(type)
                               : choose<HighProductSum<std::false_type>>(type);
  }
  if (operation == "mad") {
    bind(b, handler, type, {type, type, type});
  } else {
    bind(b, handler, type, {type, type});
  }
  b.step.slots.push_back(b.predicate_register("%cc"));
  b.step.immediate[0] = root.back() == 'c';
  b.step.immediate[1] = writes;
}

}  // namespace emulator
