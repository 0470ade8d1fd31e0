// Logical operations on words, and which bits of their results are undefined: those that the
// undefined bits of the operands decide. 0 & x is 0 whatever x is.
#pragma once

namespace emulator {

struct And {
  template <class U>
  static U apply(U a, U b) {
    return a & b;
  }
  template <class U>
  static U undefined(U a, U b, U ua, U ub) {
    return (ua | ub) & (a | ua) & (b | ub);
  }
};

struct Or {
  template <class U>
  static U apply(U a, U b) {
    return a | b;
  }
  template <class U>
  static U undefined(U a, U b, U ua, U ub) {
    return static_cast<U>((ua | ub) & (~a | ua) & (~b | ub));
  }
};

struct Xor {
  template <class U>
  static U apply(U a, U b) {
    return a ^ b;
  }
  template <class U>
  static U undefined(U, U, U ua, U ub) {
    return ua | ub;
  }
};

struct Not {
  template <class U>
  static U apply(U a) {
    return static_cast<U>(~a);
  }
  template <class U>
  static U undefined(U, U ua) {
    return ua;
  }
};

}  // namespace emulator
