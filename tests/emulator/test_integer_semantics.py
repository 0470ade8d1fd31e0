"""Integer arithmetic, against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.emulator.integers import any_value, check, clamp, columns, dtype, grid, width, wrap
from tests.emulator.single import apply

TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]


def quotient(a: int, b: int) -> int:
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def rest(a: int, b: int) -> int:
    return -1 if b == 0 else a - b * quotient(a, b)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": rest,
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("opcode", BINARY)
def test_binary(opcode, kind):
    check(f"{opcode}.{kind} %d, %a, %b;", kind, [kind, kind], BINARY[opcode])


@pytest.mark.parametrize("kind", TYPES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_binary_of_any_values(kind, data):
    rows = data.draw(st.lists(st.tuples(any_value(kind), any_value(kind)), min_size=1, max_size=70))
    for opcode, expected in BINARY.items():
        check(f"{opcode}.{kind} %d, %a, %b;", kind, [kind, kind], expected, rows)


@pytest.mark.parametrize("kind", TYPES)
def test_products(kind):
    bits = width(kind)
    check(f"mul.hi.{kind} %d, %a, %b;", kind, [kind] * 2, lambda a, b: a * b >> bits)
    check(f"mad.lo.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: a * b + c)
    check(f"mad.hi.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: (a * b >> bits) + c)
    check(f"sad.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: abs(a - b) + c)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind):
    wide = f"{kind[0]}{2 * width(kind)}"
    check(f"mul.wide.{kind} %d, %a, %b;", wide, [kind] * 2, lambda a, b: a * b)
    check(f"mad.wide.{kind} %d, %a, %b, %c;", wide, [kind, kind, wide], lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_products_of_24_bits(kind):
    def low(a: int) -> int:
        return wrap(a, f"{kind[0]}24")

    check(f"mul24.lo.{kind} %d, %a, %b;", kind, [kind] * 2, lambda a, b: low(a) * low(b))
    check(f"mul24.hi.{kind} %d, %a, %b;", kind, [kind] * 2, lambda a, b: low(a) * low(b) >> 16)
    check(f"mad24.lo.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: low(a) * low(b) + c)
    check(f"mad24.hi.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: (low(a) * low(b) >> 16) + c)


def test_saturating_forms():
    def low(a: int) -> int:
        return wrap(a, "s24")

    two, three = ["s32"] * 2, ["s32"] * 3
    check("add.sat.s32 %d, %a, %b;", "s32", two, lambda a, b: clamp(a + b, "s32"))
    check("sub.sat.s32 %d, %a, %b;", "s32", two, lambda a, b: clamp(a - b, "s32"))
    check("mad.hi.sat.s32 %d, %a, %b, %c;", "s32", three, lambda a, b, c: clamp((a * b >> 32) + c, "s32"))
    check(
        "mad24.hi.sat.s32 %d, %a, %b, %c;",
        "s32",
        three,
        lambda a, b, c: clamp((low(a) * low(b) >> 16) + c, "s32"),
    )


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_signs(kind):
    check(f"abs.{kind} %d, %a;", kind, [kind], abs)
    check(f"neg.{kind} %d, %a;", kind, [kind], lambda a: -a)


def halves(value: int, kind: str) -> list[int]:
    return [wrap(value >> shift, kind) for shift in (0, 16)]


def packed(function, kind: str):
    """Applies a function to both halves of its operands."""

    def both(*words: int) -> int:
        low, high = (function(*pair) for pair in zip(*(halves(word, kind) for word in words), strict=True))
        return low & 0xFFFF | (high & 0xFFFF) << 16

    return both


@pytest.mark.parametrize("kind", ["u16", "s16"])
def test_packed(kind):
    for opcode in ("add", "min", "max"):
        check(f"{opcode}.{kind}x2 %d, %a, %b;", "b32", ["b32"] * 2, packed(BINARY[opcode], kind))


@pytest.mark.parametrize("opcode", ["min", "max"])
def test_clamped_extrema(opcode):
    def clamped(a: int, b: int) -> int:
        return max(BINARY[opcode](a, b), 0)

    check(f"{opcode}.relu.s32 %d, %a, %b;", "s32", ["s32"] * 2, clamped)
    check(f"{opcode}.relu.s16x2 %d, %a, %b;", "b32", ["b32"] * 2, packed(clamped, "s16"))


def parts(value: int, count: int, kind: str) -> list[int]:
    size = 32 // count
    return [wrap(value >> size * i, f"{kind[0]}{size}") for i in range(count)]


def dot(a: list[int], b: list[int]) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("a_kind", ["u32", "s32"])
@pytest.mark.parametrize("b_kind", ["u32", "s32"])
def test_dot_products(a_kind, b_kind):
    def four(a: int, b: int, c: int) -> int:
        return c + dot(parts(a, 4, a_kind), parts(b, 4, b_kind))

    def two(start: int):
        return lambda a, b, c: c + dot(parts(a, 2, a_kind), parts(b, 4, b_kind)[start : start + 2])

    kinds = f"{a_kind}.{b_kind}"
    check(f"dp4a.{kinds} %d, %a, %b, %c;", "b32", ["b32"] * 3, four)
    check(f"dp2a.lo.{kinds} %d, %a, %b, %c;", "b32", ["b32"] * 3, two(0))
    check(f"dp2a.hi.{kinds} %d, %a, %b, %c;", "b32", ["b32"] * 3, two(2))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kind", ["u", "s"])
def test_carry_chains(bits, kind):
    """Sums, differences and products of two words, carried by the flag, are those of numbers of two words."""
    rows = grid(*[f"u{bits}"] * 4)[::11]
    whole = [(a | b << bits, c | e << bits) for a, b, c, e in rows]
    arrays = columns(rows, [f"u{bits}"] * 4)
    t = f"{kind}{bits}"

    def run(text: str) -> list[int]:
        return apply(text, dtype(f"u{bits}"), *arrays).tolist()

    mask = (1 << bits) - 1
    declare = f"{{.reg .b{bits} %low, %high; "
    for low, high, carried, combine in (
        ("add.cc", "addc", "addc", lambda x, y: x + y),
        ("sub.cc", "subc", "subc", lambda x, y: x - y),
    ):
        text = f"{declare}{low}.{t} %low, %a, %c; {high}.cc.{t} %high, %b, %e; "
        after = f"{carried}.{t} %d, 0, 0;}}"  # the flag itself, or its negative
        expected = [combine(x, y) for x, y in whole]
        assert run(f"{text}mov.b{bits} %d, %low;}}") == [value & mask for value in expected]
        assert run(f"{text}mov.b{bits} %d, %high;}}") == [value >> bits & mask for value in expected]
        assert run(text + after) == [value >> 2 * bits & mask for value in expected]

    # a * c + (b + e * 2^bits): the low word carries into the high one.
    signed = [wrap(a, t) * wrap(c, t) + (b | e << bits) for a, b, c, e in rows]
    text = f"{declare}mad.lo.cc.{t} %low, %a, %c, %b; madc.hi.cc.{t} %high, %a, %c, %e; "
    assert run(f"{text}mov.b{bits} %d, %low;}}") == [value & mask for value in signed]
    assert run(f"{text}mov.b{bits} %d, %high;}}") == [value >> bits & mask for value in signed]
