"""Floating-point numbers as exact fractions, and IEEE 754 rounding of them: what results are held against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Number:
    """A signed number; a magnitude of None is infinity. Zeros have signs too."""

    negative: bool
    magnitude: Fraction | None

    def __neg__(self) -> Number:
        return Number(not self.negative, self.magnitude)

    @property
    def fraction(self) -> Fraction:
        """The finite value."""
        assert self.magnitude is not None
        return -self.magnitude if self.negative else self.magnitude


Value = Number | None  # None: not a number


def number(value: Fraction | int) -> Number:
    """A finite number; zero is positive."""
    return Number(value < 0, abs(Fraction(value)))


@dataclass(frozen=True)
class Format:
    """A format of numbers, and the NaN that PTX's instructions make in it."""

    bits: int  # of a register that holds it
    precision: int  # the significand's bits, the hidden one too
    min_exponent: int  # of a normal number
    nan: int
    stored: int  # the significand's bits in the register, without the hidden one

    @property
    def largest(self) -> Fraction:
        return (2 - Fraction(2) ** (1 - self.precision)) * Fraction(2) ** (1 - self.min_exponent)

    @property
    def infinity(self) -> int:
        return (1 << self.bits - 1) - (1 << self.stored)

    def decode(self, pattern: int) -> Value:
        negative = pattern >> self.bits - 1 != 0
        magnitude = pattern & (1 << self.bits - 1) - 1
        if magnitude >= self.infinity:
            return Number(negative, None) if magnitude == self.infinity else None
        field = magnitude >> self.stored
        significand = magnitude & (1 << self.stored) - 1 | (1 << self.stored if field else 0)
        return Number(
            negative, significand * Fraction(2) ** (self.min_exponent + max(field, 1) - 1 - self.stored)
        )

    def encode(self, value: Value, rounding: str = "rn", satfinite: bool = False) -> int:
        """The pattern of the value rounded once: "rn", "rna", "rz", "rm" or "rp"."""
        if value is None:
            return self.nan
        sign = int(value.negative) << self.bits - 1
        if value.magnitude is None:
            return sign | (self._pattern(self.largest) if satfinite else self.infinity)
        rounded = self._round(value.magnitude, value.negative, rounding)
        if rounded <= self.largest:
            return sign | self._pattern(rounded)
        inwards = rounding == "rz" or rounding == ("rp" if value.negative else "rm")
        return sign | (self._pattern(self.largest) if inwards or satfinite else self.infinity)

    def _unit(self, magnitude: Fraction) -> Fraction:
        exponent = self.min_exponent
        if magnitude > 0:
            exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
            exponent -= Fraction(2) ** exponent > magnitude
        return Fraction(2) ** (max(exponent, self.min_exponent) - (self.precision - 1))

    def _round(self, magnitude: Fraction, negative: bool, rounding: str) -> Fraction:
        unit = self._unit(magnitude)
        return round_to_integer(magnitude / unit, negative, rounding) * unit

    def _pattern(self, magnitude: Fraction) -> int:
        unit = Fraction(2) ** (self.min_exponent - self.stored)
        if magnitude < Fraction(2) ** self.min_exponent:
            return int(magnitude / unit)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        fraction = (magnitude / Fraction(2) ** exponent - 1) * (1 << self.stored)
        return (exponent - self.min_exponent + 1 << self.stored) + int(fraction)


F16 = Format(16, 11, -14, 0x7FFF, 10)
BF16 = Format(16, 8, -126, 0x7FFF, 7)
F32 = Format(32, 24, -126, 0x7FFFFFFF, 23)
TF32 = Format(32, 11, -126, 0x7FFFFFFF, 23)  # an f32 register, of which 13 bits stay zero
F64 = Format(64, 53, -1022, 0x7FF8000000000000, 52)


def round_to_integer(magnitude: Fraction, negative: bool, rounding: str) -> int:
    """Rounds a magnitude in the direction that suits its sign."""
    whole = math.floor(magnitude)
    rest = magnitude - whole
    if rounding in ("rn", "rna"):
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and (rounding == "rna" or whole % 2 == 1))
    else:
        up = rest > 0 and rounding == ("rm" if negative else "rp")
    return whole + up


def add(x: Value, y: Value, rounding: str = "rn") -> Value:
    if x is None or y is None:
        return None
    if x.magnitude is None or y.magnitude is None:
        if x.magnitude is None and y.magnitude is None and x.negative != y.negative:
            return None
        return x if x.magnitude is None else y
    total = x.fraction + y.fraction
    if total != 0:
        return number(total)
    # An exact zero is positive, but for sums of negative zeros, and when rounding down.
    return Number(x.negative if x.negative == y.negative else rounding == "rm", Fraction(0))


def multiply(x: Value, y: Value) -> Value:
    if x is None or y is None:
        return None
    negative = x.negative != y.negative
    if x.magnitude is None or y.magnitude is None:
        return None if 0 in (x.magnitude, y.magnitude) else Number(negative, None)
    return Number(negative, x.magnitude * y.magnitude)


def divide(x: Value, y: Value) -> Value:
    if x is None or y is None or (x.magnitude is None and y.magnitude is None):
        return None
    negative = x.negative != y.negative
    if x.magnitude is None:
        return Number(negative, None)
    if y.magnitude is None:
        return Number(negative, Fraction(0))
    if y.magnitude == 0:
        return None if x.magnitude == 0 else Number(negative, None)
    return Number(negative, x.magnitude / y.magnitude)


def square_root(x: Value) -> Value:
    """The root, or where it is irrational a number that every format rounds as it would the root."""
    if x is None or x.magnitude == 0:
        return x
    if x.negative:
        return None
    if x.magnitude is None:
        return x
    shift = 2 * (128 + x.magnitude.denominator.bit_length())
    scaled, rest = divmod(x.magnitude.numerator << shift, x.magnitude.denominator)
    root = math.isqrt(scaled)
    inexact = rest != 0 or root * root != scaled
    return Number(False, Fraction(2 * root + inexact, 2 << shift // 2))


def clamp_to_unit(value: Value) -> Value:
    """.sat: into [0, 1], and what is no number to 0."""
    if value is None or value.negative:
        return number(0)
    return number(1) if value.magnitude is None or value.magnitude > 1 else value


def clamp_to_positive(value: Value) -> Value:
    """.relu."""
    return number(0) if value is not None and value.negative else value
