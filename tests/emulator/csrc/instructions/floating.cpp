// Floating-point arithmetic (PTX ISA, "Floating Point Instructions", "Half Precision Floating Point
// Instructions").
//
// .approx instructions are worked out in double precision and rounded once, which is more accurate
// than any GPU. An operation without a rounding modifier, which ptxas may contract with another to
// an fma, is done by itself.
#include "arithmetic/floating.h"

#include <map>

#include "instructions/select.h"

namespace emulator {
namespace {

using ptx::Type;

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return add(a, b);
  }
};
struct Subtract {
  template <class T>
  static T apply(T a, T b) {
    return add(a, with_sign(b, !sign_of(b)));
  }
};
struct Multiply {
  template <class T>
  static T apply(T a, T b) {
    return multiply(a, b);
  }
};
struct MultiplyAdd {
  template <class T>
  static T apply(T a, T b, T c) {
    return multiply_add(a, b, c);
  }
};
struct Divide {
  template <class T>
  static T apply(T a, T b) {
    return a / b;
  }
};
struct Reciprocal {
  template <class T>
  static T apply(T a) {
    return 1 / a;
  }
};
struct SquareRoot {
  template <class T>
  static T apply(T a) {
    return std::sqrt(a);
  }
};

// .approx: of f32, f16 and bf16 values through double.
template <double (*function)(double)>
struct Approximate {
  template <class T>
  static T apply(T a) {
    return Rounded<T>::from(function(value_of(a)));
  }
};

double inverse(double x) {
  return 1 / x;
}
double inverse_square_root(double x) {
  return 1 / std::sqrt(x);
}

struct DivideFull {
  static float apply(float a, float b) { return static_cast<float>(double{a} / double{b}); }
};
// div.approx multiplies by a reciprocal, which is flushed for divisors above 2^126.
struct DivideApproximate {
  static float apply(float a, float b) {
    return std::fabs(b) > 0x1p126f ? a * std::copysign(0.0f, b) : DivideFull::apply(a, b);
  }
};

// {rcp,rsqrt}.approx.ftz.f64 read and write the high halves alone: 20 bits of fraction.
template <double (*function)(double)>
struct ApproximateHigh {
  static double apply(double a) {
    const double x = flush(bit_cast<double>(bits_of(a) & kHigh));
    const double result = flush(function(x));
    if (is_nan(result)) return bit_cast<double>(uint64_t{Binary32::kNaN} << 32);
    return bit_cast<double>((bits_of(result) + (uint64_t{1} << 31)) & kHigh);
  }
  static constexpr uint64_t kHigh = ~uint64_t{0} << 32;
};
struct InverseSquareRoot64 {  // rsqrt.approx.f64
  static double apply(double a) {
    return static_cast<double>(1 / std::sqrt(static_cast<long double>(a)));
  }
};

template <class Op>
struct Canonical {
  template <class... T>
  static auto apply(T... x) {
    return canonical(Op::apply(x...));
  }
};

enum class Clamp { None, Unit, Positive };  // .sat, .relu

// An operation with modifiers: step.immediate holds the rounding mode, .ftz, and the clamp.
template <class Op>
class Modified {
 public:
  explicit Modified(const Step& step)
      : host_(static_cast<Rounding>(step.immediate[0])),
        ftz_(step.immediate[1] != 0),
        clamp_(static_cast<Clamp>(step.immediate[2])) {}

  template <class T, class... Rest>
  T apply(T a, Rest... rest) const {
    const T result = canonical(fenced(Op::apply(prepare(a), prepare(rest)...)));
    const T flushed = ftz_ ? flush(result) : result;
    if (clamp_ == Clamp::Unit) return saturate_to_unit(flushed);
    return clamp_ == Clamp::Positive ? clamp_to_positive(flushed) : flushed;
  }

 private:
  template <class T>
  T prepare(T x) const {
    return fenced(ftz_ ? flush(x) : x);
  }
  // 16-bit types round to nearest alone, and not by the host's mode.
  template <class T>
  static T fenced(T x) {
    if constexpr (std::is_floating_point_v<T>) return opaque(x);
    return x;
  }

  HostRounding host_;
  bool ftz_;
  Clamp clamp_;
};

// Undefined bits stay in their places; the sign of an absolute value is known.
struct Negate {
  template <class T>
  static T apply(T a) {
    return with_sign(a, !sign_of(a));
  }
  template <class T, class U>
  static U undefined(T, U ua) {
    return ua;
  }
};
struct Absolute {
  template <class T>
  static T apply(T a) {
    return with_sign(a, false);
  }
  template <class T, class U>
  static U undefined(T, U ua) {
    return static_cast<U>(ua & ~kSignBit<T>);
  }
};
template <class Op>
struct Flushed {
  template <class T>
  static T apply(T a) {
    return Op::apply(flush(a));
  }
};

struct CopySign {
  template <class T>
  static T apply(T a, T b) {
    return with_sign(b, sign_of(a));
  }
  template <class T, class U>
  static U undefined(T, T, U ua, U ub) {
    return static_cast<U>((ua & kSignBit<T>) | (ub & ~kSignBit<T>));
  }
};

// min, max: immediates say .ftz, .NaN and .xorsign.abs.
template <bool kMaximum>
class Extremum {
 public:
  explicit Extremum(const Step& step)
      : ftz_(step.immediate[0] != 0),
        nan_(step.immediate[1] != 0),
        xorsign_(step.immediate[2] != 0) {}

  template <class T>
  T apply(T a, T b) const {
    if (ftz_) a = flush(a), b = flush(b);
    const bool sign = sign_of(a) != sign_of(b);
    if (xorsign_) a = with_sign(a, false), b = with_sign(b, false);
    if (nan_ ? is_nan(a) || is_nan(b) : is_nan(a) && is_nan(b)) return canonical(is_nan(a) ? a : b);
    const bool first = is_nan(b) || (!is_nan(a) && (kMaximum ? precedes(b, a) : precedes(a, b)));
    const T result = first ? a : b;
    return xorsign_ ? with_sign(result, sign) : result;
  }

 private:
  bool ftz_, nan_, xorsign_;
};

enum class Property { Finite, Infinite, Number, NotANumber, Normal, Subnormal };

class HasProperty {
 public:
  explicit HasProperty(const Step& step) : property_(static_cast<Property>(step.immediate[0])) {}

  template <class T>
  bool apply(T a) const {
    const int category = std::fpclassify(a);
    switch (property_) {
      case Property::Finite:
        return category != FP_NAN && category != FP_INFINITE;
      case Property::Infinite:
        return category == FP_INFINITE;
      case Property::Number:
        return category != FP_NAN;
      case Property::NotANumber:
        return category == FP_NAN;
      case Property::Normal:  // the ISA counts zeros in
        return category == FP_NORMAL || category == FP_ZERO;
      case Property::Subnormal:
        return category == FP_SUBNORMAL;
    }
    return false;
  }

 private:
  Property property_;
};

bool is_f32(const Type& type) {
  return type == Type{Type::Class::Float, 32, 1};
}
bool is_f64(const Type& type) {
  return type == Type{Type::Class::Float, 64, 1};
}

// The handler for 16-bit types; nullptr for others.
template <class Op, int Sources>
Handler for_halves(const Type& type) {
  if (type.bits != 16) return nullptr;
  if (type.cls == Type::Class::Float) {
    return type.count == 2 ? uniform<2, Op, F16, Sources>() : uniform<1, Op, F16, Sources>();
  }
  if (type.cls == Type::Class::BFloat) {
    return type.count == 2 ? uniform<2, Op, BF16, Sources>() : uniform<1, Op, BF16, Sources>();
  }
  return nullptr;
}

template <class Op, int Sources>
Handler for_singles_and_doubles(const Type& type) {
  if (is_f32(type)) return uniform<1, Op, float, Sources>();
  if (is_f64(type)) return uniform<1, Op, double, Sources>();
  return nullptr;
}

// {.rnd}{.ftz}{.sat,.relu} of arithmetic.
struct Modifiers {
  bool has_rounding = false;
  Rounding rounding = Rounding::Nearest;
  bool ftz = false;
  Clamp clamp = Clamp::None;

  explicit Modifiers(Binder& b) {
    has_rounding = take_rounding(b, &rounding);
    ftz = b.take("ftz");
    if (b.take("sat")) clamp = Clamp::Unit;
    if (b.take("relu")) clamp = Clamp::Positive;
  }
  bool any() const { return rounding != Rounding::Nearest || ftz || clamp != Clamp::None; }
  void place(Step& step) const {
    step.immediate[0] = static_cast<int64_t>(rounding);
    step.immediate[1] = ftz;
    step.immediate[2] = static_cast<int64_t>(clamp);
  }
};

void bind_uniform(Binder& b, Handler run, const Type& type, int sources) {
  if (sources == 1) bind(b, run, type, {type});
  if (sources == 2) bind(b, run, type, {type, type});
  if (sources == 3) bind(b, run, type, {type, type, type});
}

// add, sub, mul, fma, of every type.
template <class Op, int Sources>
void bind_arithmetic(Binder& b) {
  const Modifiers modifiers(b);
  const Type type = b.type();
  const bool half = type.bits == 16;
  const bool packed = type == Type{Type::Class::Float, 32, 2};
  // Each type has its own: 16-bit types round to nearest alone, .sat is not of bf16 nor of f32x2,
  // .relu is the 16-bit fma's, and f64 is flushed and clamped never.
  const bool bfloat = type.cls == Type::Class::BFloat;
  const bool sat = modifiers.clamp == Clamp::Unit, relu = modifiers.clamp == Clamp::Positive;
  if ((half && modifiers.rounding != Rounding::Nearest) ||
      (modifiers.ftz && (bfloat || is_f64(type))) || (sat && (bfloat || packed || is_f64(type))) ||
      (relu && (!half || Sources != 3))) {
    b.unsupported("these modifiers for this type");
  }
  modifiers.place(b.step);
  Handler run = for_halves<Modified<Op>, Sources>(type);
  if (modifiers.any()) {
    if (!half) run = for_singles_and_doubles<Modified<Op>, Sources>(type);
    if (packed) run = uniform<2, Modified<Op>, float, Sources>();
  } else {
    if (!half) run = for_singles_and_doubles<Canonical<Op>, Sources>(type);
    if (packed) run = uniform<2, Canonical<Op>, float, Sources>();
  }
  bind_uniform(b, run, type, Sources);
}

void bind_multiply_add(Binder& b) {
  bind_arithmetic<MultiplyAdd, 3>(b);
}

// div.rnd, rcp.rnd, sqrt.rnd: the correctly rounded forms, whose mode must be given.
template <class Op, int Sources>
void bind_rounded(Binder& b) {
  const Modifiers modifiers(b);
  const Type type = b.type();
  if (!modifiers.has_rounding || modifiers.clamp != Clamp::None ||
      (modifiers.ftz && !is_f32(type))) {
    b.unsupported("this form");
  }
  modifiers.place(b.step);
  bind_uniform(b, for_singles_and_doubles<Modified<Op>, Sources>(type), type, Sources);
}

// .approx{.ftz}.f32, where .approx was taken.
template <class Op, int Sources>
void bind_approximate(Binder& b) {
  b.step.immediate[1] = b.take("ftz");
  const Type type = b.type();
  bind_uniform(b, is_f32(type) ? uniform<1, Modified<Op>, float, Sources>() : nullptr, type,
               Sources);
}

// sin, cos, lg2: nothing but .approx{.ftz}.f32.
template <double (*function)(double)>
void bind_function(Binder& b) {
  if (!b.take("approx")) b.unsupported("another form than .approx");
  bind_approximate<Approximate<function>, 1>(b);
}

// ex2, tanh: of 16-bit types too.
template <double (*function)(double)>
void bind_half_function(Binder& b) {
  if (!b.take("approx")) b.unsupported("another form than .approx");
  const bool ftz = b.take("ftz");
  const Type type = b.type();
  b.step.immediate[1] = ftz;
  Handler run = for_halves<Modified<Approximate<function>>, 1>(type);
  if (is_f32(type)) run = uniform<1, Modified<Approximate<function>>, float, 1>();
  bind_uniform(b, run, type, 1);
}

void bind_divide(Binder& b) {
  if (b.take("approx")) return bind_approximate<DivideApproximate, 2>(b);
  if (b.take("full")) return bind_approximate<DivideFull, 2>(b);
  bind_rounded<Divide, 2>(b);
}

void bind_reciprocal(Binder& b) {
  if (!b.take("approx")) return bind_rounded<Reciprocal, 1>(b);
  if (!b.instruction.has("f64")) return bind_approximate<Approximate<inverse>, 1>(b);
  if (!b.take("ftz")) b.unsupported("this form");
  const Type type = b.type();
  bind(b, Elementwise<ApproximateHigh<inverse>, double, double>::run, type, {type});
}

void bind_square_root(Binder& b) {
  if (b.take("approx")) return bind_approximate<Approximate<std::sqrt>, 1>(b);
  bind_rounded<SquareRoot, 1>(b);
}

void bind_inverse_square_root(Binder& b) {
  if (!b.take("approx")) b.unsupported("another form than .approx");
  if (!b.instruction.has("f64")) return bind_approximate<Approximate<inverse_square_root>, 1>(b);
  const bool high = b.take("ftz");
  const Type type = b.type();
  bind(b,
       high ? Elementwise<ApproximateHigh<inverse_square_root>, double, double>::run
            : Elementwise<InverseSquareRoot64, double, double>::run,
       type, {type});
}

template <class Op>
void bind_sign(Binder& b) {  // abs, neg
  const bool ftz = b.take("ftz");
  const Type type = b.type();
  Handler run = for_halves<Op, 1>(type);
  if (type.bits != 16) run = for_singles_and_doubles<Op, 1>(type);
  if (ftz)
    run = is_f32(type) ? uniform<1, Flushed<Op>, float, 1>() : for_halves<Flushed<Op>, 1>(type);
  bind(b, run, type, {type});
}

template <bool kMaximum>
void bind_extremum(Binder& b) {
  b.step.immediate[0] = b.take("ftz");
  b.step.immediate[1] = b.take("NaN");
  const bool xorsign = b.take("xorsign");
  if (xorsign != b.take("abs")) b.unsupported(".xorsign and .abs apart");
  b.step.immediate[2] = xorsign;
  const Type type = b.type();
  using Op = Extremum<kMaximum>;
  bind_uniform(b, type.bits == 16 ? for_halves<Op, 2>(type) : for_singles_and_doubles<Op, 2>(type),
               type, 2);
}

void bind_copysign(Binder& b) {
  const Type type = b.type();
  bind(b, for_singles_and_doubles<CopySign, 2>(type), type, {type, type});
}

void bind_property(Binder& b) {
  static const std::map<std::string, Property> kProperties = {
      {"finite", Property::Finite}, {"infinite", Property::Infinite},
      {"number", Property::Number}, {"notanumber", Property::NotANumber},
      {"normal", Property::Normal}, {"subnormal", Property::Subnormal}};
  const auto found = kProperties.find(b.next());
  if (found == kProperties.end()) b.unsupported("`" + b.next() + "`");
  b.take(b.next());
  const Type type = b.type();
  Handler run = nullptr;
  if (is_f32(type)) run = Predicated<HasProperty, float>::run;
  if (is_f64(type)) run = Predicated<HasProperty, double>::run;
  b.step.immediate[0] = static_cast<int64_t>(found->second);
  bind(b, run, kPredicate, {type});
}

}  // namespace

bool take_rounding(Binder& b, Rounding* rounding) {
  static const std::map<std::string, Rounding> kModes = {{"rn", Rounding::Nearest},
                                                         {"rz", Rounding::Zero},
                                                         {"rm", Rounding::Down},
                                                         {"rp", Rounding::Up}};
  const auto found = kModes.find(b.next());
  if (found == kModes.end()) return false;
  *rounding = found->second;
  return b.take(b.next());
}

void bind_floating(Binder& b) {
  static const std::map<std::string, Bind> kBinders = {{"add", bind_arithmetic<Add, 2>},
                                                       {"sub", bind_arithmetic<Subtract, 2>},
                                                       {"mul", bind_arithmetic<Multiply, 2>},
                                                       {"mad", bind_multiply_add},
                                                       {"div", bind_divide},
                                                       {"abs", bind_sign<Absolute>},
                                                       {"neg", bind_sign<Negate>},
                                                       {"min", bind_extremum<false>},
                                                       {"max", bind_extremum<true>}};
  kBinders.at(b.instruction.root)(b);
}

void add_floating(Opcodes& opcodes) {
  opcodes.add("fma", bind_multiply_add);
  opcodes.add("rcp", bind_reciprocal);
  opcodes.add("sqrt", bind_square_root);
  opcodes.add("rsqrt", bind_inverse_square_root);
  opcodes.add("sin", bind_function<std::sin>);
  opcodes.add("cos", bind_function<std::cos>);
  opcodes.add("lg2", bind_function<std::log2>);
  opcodes.add("ex2", bind_half_function<std::exp2>);
  opcodes.add("tanh", bind_half_function<std::tanh>);
  opcodes.add("copysign", bind_copysign);
  opcodes.add("testp", bind_property);
}

}  // namespace emulator
