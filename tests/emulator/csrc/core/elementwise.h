// Instructions that compute lane by lane: d = op.apply(a, b, ...).
//
// An Op is a struct with a total function `D apply(S...)`: static, or a const member of an Op that
// is made from the Step, whose immediates then tell what the binder knew. Where "any undefined bit
// makes the whole result undefined" is too coarse, `undefined(S values..., U undefined...)` beside
// it, with U the unsigned word of S's size, returns the undefined bits of the result, as Memcheck's
// bit-precise shadow does.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/step.h"
#include "core/warp.h"

namespace emulator {

namespace detail {

template <size_t Bytes>
using Word = std::conditional_t<
    Bytes == 1, uint8_t,
    std::conditional_t<Bytes == 2, uint16_t, std::conditional_t<Bytes == 4, uint32_t, uint64_t>>>;
template <class T>
using Bits = Word<sizeof(T)>;

template <class Op>
Op make(const Step& step) {
  if constexpr (std::is_constructible_v<Op, const Step&>) {
    return Op(step);
  } else {
    return Op{};
  }
}

template <class Op, class Values, class Undefined, class = void>
struct HasUndefined : std::false_type {};
template <class Op, class... V, class... U>
struct HasUndefined<Op, std::tuple<V...>, std::tuple<U...>,
                    std::void_t<decltype(std::declval<const Op&>().undefined(
                        std::declval<V>()..., std::declval<U>()...))>> : std::true_type {};

// Element `n` of lane `l` of a slot whose lanes hold several elements of type S.
template <class S>
S element(const Warp& warp, const Slot& slot, int l, int n, int per_lane) {
  return warp.lanes<S>(slot)[l * per_lane + n];
}
template <class S>
Bits<S> undefined_element(const Warp& warp, const Slot& slot, int l, int n) {
  return static_cast<Bits<S>>(warp.undefined_of<uint64_t>(slot, l) >> (8 * sizeof(S) * n));
}

// The undefined bits of one element of the result; those of a D (or of a predicate, D = bool).
template <class D, class Op, class... S>
uint64_t undefined_bits(const Op& op, S... values, Bits<S>... undefined) {
  if constexpr (HasUndefined<Op, std::tuple<S...>, std::tuple<Bits<S>...>>::value) {
    return static_cast<Bits<D>>(op.undefined(values..., undefined...));
  } else {
    return ((undefined != 0) || ...) ? Bits<D>(~Bits<D>{0}) : Bits<D>{0};
  }
}

}  // namespace detail

// N elements a lane, side by side: f16x2 is N = 2 of f16. step.slots: the destination, then the
// sources.
template <int N, class Op, class D, class... S>
struct Packed {
  static void run(Warp& warp, const Step& step, LaneMask active) {
    compute(warp, step, active, std::index_sequence_for<S...>{});
  }

 private:
  using Lane = detail::Word<N * sizeof(D)>;

  template <size_t... I>
  static void compute(Warp& warp, const Step& step, LaneMask active, std::index_sequence<I...>) {
    const Slot d = step.slots[0];
    Lane result[kLanes];
    {
      const auto op = detail::make<Op>(step);
      const std::tuple<const S*...> sources{warp.lanes<S>(step.slots[I + 1])...};
      D elements[kLanes * N];
      for (int e = 0; e < kLanes * N; ++e) elements[e] = op.apply(std::get<I>(sources)[e]...);
      std::memcpy(result, elements, sizeof result);
    }
    const LaneMask tainted = (warp.tainted(step.slots[I + 1]) | ... | LaneMask{0}) & active;
    if (tainted == 0) {
      warp.store(d, result, active);
      return;
    }
    // The undefined bits are worked out before the result is stored: d may be one of the sources.
    const auto op = detail::make<Op>(step);
    uint64_t undefined[kLanes];
    for_each_lane(tainted, [&](int l) {
      undefined[l] = 0;
      for (int n = 0; n < N; ++n) {
        const uint64_t bits = detail::undefined_bits<D, std::remove_const_t<decltype(op)>, S...>(
            op, detail::element<S>(warp, step.slots[I + 1], l, n, N)...,
            detail::undefined_element<S>(warp, step.slots[I + 1], l, n)...);
        undefined[l] |= bits << (8 * sizeof(D) * n);
      }
    });
    warp.store(d, result, active);
    for_each_lane(tainted, [&](int l) { warp.set_undefined(d, l, undefined[l]); });
  }
};

template <class Op, class D, class... S>
using Elementwise = Packed<1, Op, D, S...>;

// What a test says of each lane, and in which lanes it cannot be known.
struct Verdict {
  LaneMask holds = 0;
  LaneMask undefined = 0;
};

// Tests element `n` of every lane, of which there are N, with an Op whose result is a bool.
template <int N, class Op, class... S>
struct Test {
  static Verdict run(const Warp& warp, const Step& step,
                     const std::array<Slot, sizeof...(S)>& sources, int n, LaneMask active) {
    return compute(warp, step, sources, n, active, std::index_sequence_for<S...>{});
  }

 private:
  template <size_t... I>
  static Verdict compute(const Warp& warp, const Step& step,
                         const std::array<Slot, sizeof...(S)>& sources, int n, LaneMask active,
                         std::index_sequence<I...>) {
    const auto op = detail::make<Op>(step);
    const std::tuple<const S*...> lanes{warp.lanes<S>(sources[I])...};
    Verdict verdict;
    for (int l = 0; l < kLanes; ++l) {
      verdict.holds |= LaneMask{op.apply(std::get<I>(lanes)[l * N + n]...)} << l;
    }
    const LaneMask tainted = (warp.tainted(sources[I]) | ... | LaneMask{0}) & active;
    for_each_lane(tainted, [&](int l) {
      const bool unknown = detail::undefined_bits<bool, std::remove_const_t<decltype(op)>, S...>(
                               op, detail::element<S>(warp, sources[I], l, n, N)...,
                               detail::undefined_element<S>(warp, sources[I], l, n)...) != 0;
      if (unknown) verdict.undefined |= lane_bit(l);
    });
    return verdict;
  }
};

// An instruction whose destination is a predicate. step.slots: the destination, then the sources.
template <class Op, class... S>
struct Predicated {
  static void run(Warp& warp, const Step& step, LaneMask active) {
    std::array<Slot, sizeof...(S)> sources;
    for (size_t i = 0; i < sources.size(); ++i) sources[i] = step.slots[i + 1];
    const Verdict verdict = Test<1, Op, S...>::run(warp, step, sources, 0, active);
    warp.store_predicate(step.slots[0], verdict.holds, active, verdict.undefined);
  }
};

}  // namespace emulator
