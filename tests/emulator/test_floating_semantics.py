"""Floating-point arithmetic, against exact fractions rounded once.

Results are compared bit by bit. The NaNs of f64, whose payload the ISA leaves open, only have to be NaNs.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.emulator import exact
from tests.emulator.exact import BF16, F16, F32, F64, Format, Number, Value
from tests.emulator.single import apply

FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
ROUNDINGS = ["rn", "rz", "rm", "rp"]


def edges(form: Format) -> list[int]:
    """Patterns: zeros, subnormals, the ends of the range, NaNs, and numbers that sum and multiply to ties."""
    one, unit = form.encode(exact.number(1)), 1 << form.stored
    largest = form.infinity - 1
    patterns = [0, 1, 2, 3, unit // 2, unit - 1, unit, unit + 1, 3 * unit, form.infinity // 4]
    patterns += [one - 1, one, one + 1, one + unit // 2, one + unit // 2 + 1, one + 2 * unit + 3]
    patterns += [
        one - (form.precision - 1) * unit,
        one - form.precision * unit,
        one - form.precision * unit + 1,
    ]
    patterns += [one + form.precision * unit, largest, largest - 1, largest - unit, form.infinity]
    patterns += [form.infinity + 1, form.nan]
    return [pattern | sign for pattern in patterns for sign in (0, 1 << form.bits - 1)]


def words(form: Format) -> np.dtype:
    return np.dtype(f"uint{form.bits}")


def columns(form: Format, rows) -> list[np.ndarray]:
    return [np.array(column, words(form)) for column in zip(*rows, strict=True)]


def flushed(form: Format, pattern: int) -> int:
    """.ftz: a subnormal is the zero of its sign."""
    magnitude = pattern & (1 << form.bits - 1) - 1
    return pattern - magnitude if magnitude < 1 << form.stored else pattern


def same(form: Format, got: int, right: int) -> bool:
    return got == right or (form is F64 and form.decode(got) is None and form.decode(right) is None)


def compare(instruction: str, form: Format, rows, got, expected) -> None:
    right = [expected(*row) for row in rows]
    wrong = [case for case in zip(rows, got, right, strict=True) if not same(form, *case[1:])]
    assert not wrong, f"{instruction}: {len(wrong)} wrong, first (sources, got, expected): " + str(
        [[hex(x) for x in wrong[0][0]], hex(wrong[0][1]), hex(wrong[0][2])]
    )


def check(kind: str, opcode: str, rows, expected, *, packed: bool = False) -> None:
    """Checks `opcode.kind`, and its packed form too, on rows of patterns."""
    form = FORMATS[kind]
    sources = columns(form, rows)
    names = ", ".join(f"%{name}" for name, _ in zip("dabc", range(len(sources) + 1), strict=False))
    instruction = f"{opcode}.{kind} {names};"
    compare(instruction, form, rows, apply(instruction, words(form), *sources).tolist(), expected)
    if packed:
        instruction = f"{opcode}.{kind}x2 {names};"
        padded = [np.concatenate([source, source[: -len(source) % 2]]) for source in sources]
        double = f"uint{2 * form.bits}"
        got = apply(instruction, double, *(source.view(double) for source in padded)).view(words(form))
        compare(instruction, form, rows, got[: len(rows)].tolist(), expected)


def calculation(form: Format, function, rounding="rn", *, ftz=False, sat=False, relu=False):
    """What an instruction with these modifiers makes of patterns; `function` is on exact values."""

    def expected(*patterns: int) -> int:
        value = function(*(form.decode(flushed(form, p) if ftz else p) for p in patterns))
        pattern = form.encode(value, rounding)
        if ftz:
            pattern = flushed(form, pattern)
        if sat:
            return form.encode(exact.clamp_to_unit(form.decode(pattern)))
        return form.encode(exact.clamp_to_positive(form.decode(pattern))) if relu else pattern

    return expected


def arithmetic(opcode: str, rounding: str):
    """The exact function of add, sub, mul, fma; only the sign of a zero depends on the rounding."""
    return {
        "add": lambda x, y: exact.add(x, y, rounding),
        "sub": lambda x, y: exact.add(x, None if y is None else -y, rounding),
        "mul": exact.multiply,
        "fma": lambda x, y, z: exact.add(exact.multiply(x, y), z, rounding),
    }[opcode]


def grid(form: Format, operands: int) -> list[tuple[int, ...]]:
    rows = list(itertools.product(edges(form), repeat=operands))
    return rows[:: 1 if operands < 3 else 29]


@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("kind", FORMATS)
def test_to_nearest(kind, opcode):
    form = FORMATS[kind]
    rows = grid(form, 3 if opcode == "fma" else 2)
    expected = calculation(form, arithmetic(opcode, "rn"))
    check(kind, f"{opcode}.rn", rows, expected, packed=kind != "f64")
    if opcode != "fma":
        check(kind, opcode, rows, expected)


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_directed(kind, opcode, rounding):
    form = FORMATS[kind]
    rows = grid(form, 3 if opcode == "fma" else 2)
    expected = calculation(form, arithmetic(opcode, rounding), rounding)
    check(kind, f"{opcode}.{rounding}", rows, expected, packed=kind == "f32")


@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_any_values(kind, opcode, data):
    form = FORMATS[kind]
    pattern = st.integers(0, (1 << form.bits) - 1)
    # Operands of like exponents cancel and tie more often than any.
    near = st.integers(form.encode(exact.number(Fraction(1, 4))), form.encode(exact.number(8)))
    values = pattern | near | near.map(lambda p: p | 1 << form.bits - 1)
    count = 3 if opcode == "fma" else 2
    rows = data.draw(st.lists(st.tuples(*[values] * count), min_size=1, max_size=64))
    for rounding in ROUNDINGS if kind in ("f32", "f64") else ["rn"]:
        check(kind, f"{opcode}.{rounding}", rows, calculation(form, arithmetic(opcode, rounding), rounding))


def test_bf16_fma_is_rounded_once():
    """Products halfway between two bf16 numbers, and addends far below the last bit of a double."""
    half_way = BF16.encode(exact.number(Fraction(3, 2)))
    tie = BF16.encode(exact.number(Fraction(214, 128)))
    tiny = [
        BF16.encode(exact.number(sign * Fraction(2) ** -power))
        for power in (60, 100, 133)
        for sign in (1, -1)
    ]
    rows = [(half_way, tie, c) for c in tiny]
    product = Fraction(3, 2) * Fraction(214, 128)
    assert product / Fraction(1, 64) % 1 == Fraction(1, 2)  # halfway indeed
    check("bf16", "fma.rn", rows, calculation(BF16, arithmetic("fma", "rn")), packed=True)


MODIFIED = [
    *(
        (kind, op, r, m)
        for kind in ["f32"]
        for op in ["add", "mul", "fma"]
        for r in ["rn", "rp"]
        for m in ["ftz", "sat", "ftz.sat"]
    ),
    *(("f16", op, "rn", m) for op in ["add", "sub", "mul", "fma"] for m in ["ftz", "sat", "ftz.sat"]),
    *(("f16", "fma", "rn", m) for m in ["relu", "ftz.relu"]),
    ("bf16", "fma", "rn", "relu"),
]


@pytest.mark.parametrize(("kind", "opcode", "rounding", "modifiers"), MODIFIED)
def test_modifiers(kind, opcode, rounding, modifiers):
    form = FORMATS[kind]
    chosen = {name: name in modifiers.split(".") for name in ("ftz", "sat", "relu")}
    expected = calculation(form, arithmetic(opcode, rounding), rounding, **chosen)
    rows = grid(form, 3 if opcode == "fma" else 2)[::3]
    check(kind, f"{opcode}.{rounding}.{modifiers}", rows, expected, packed=form.bits == 16)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_division_and_roots(kind, rounding):
    form = FORMATS[kind]

    def inverse(x: Value) -> Value:
        return exact.divide(exact.number(1), x)

    check(kind, f"div.{rounding}", grid(form, 2), calculation(form, exact.divide, rounding))
    check(kind, f"rcp.{rounding}", grid(form, 1), calculation(form, inverse, rounding))
    check(kind, f"sqrt.{rounding}", grid(form, 1), calculation(form, exact.square_root, rounding))
    if kind == "f32":
        check(kind, f"div.{rounding}.ftz", grid(form, 2), calculation(form, exact.divide, rounding, ftz=True))
        check(kind, f"rcp.{rounding}.ftz", grid(form, 1), calculation(form, inverse, rounding, ftz=True))


def test_mad_is_fma():
    expected = calculation(F32, arithmetic("fma", "rz"), "rz")
    check("f32", "mad.rz", grid(F32, 3), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_signs(kind):
    form = FORMATS[kind]
    top = 1 << form.bits - 1
    # What becomes of a NaN's payload is left open: it is kept.
    check(kind, "neg", grid(form, 1), lambda a: a ^ top, packed=form.bits == 16)
    check(kind, "abs", grid(form, 1), lambda a: a & ~top, packed=form.bits == 16)
    if kind in ("f16", "f32"):
        check(kind, "neg.ftz", grid(form, 1), lambda a: flushed(form, a) ^ top)
        check(kind, "abs.ftz", grid(form, 1), lambda a: flushed(form, a) & ~top)
    if kind in ("f32", "f64"):
        check(kind, "copysign", grid(form, 2), lambda a, b: a & top | b & ~top)


def key(form: Format, pattern: int) -> tuple[Fraction | float, bool]:
    """Orders numbers, with -0 before +0."""
    value = form.decode(pattern)
    assert value is not None
    size = math.inf if value.magnitude is None else value.magnitude
    return (-size if value.negative else size, not value.negative)


EXTREMA = [
    *((kind, "") for kind in FORMATS),
    *((kind, m) for kind in ["f16", "bf16", "f32"] for m in [".NaN", ".xorsign.abs", ".NaN.xorsign.abs"]),
    *((kind, m) for kind in ["f16", "f32"] for m in [".ftz", ".ftz.NaN.xorsign.abs"]),
]


@pytest.mark.parametrize(("kind", "modifiers"), EXTREMA)
@pytest.mark.parametrize("opcode", ["min", "max"])
def test_extrema(kind, opcode, modifiers):
    form = FORMATS[kind]
    top = 1 << form.bits - 1

    def expected(a: int, b: int) -> int:
        if "ftz" in modifiers:
            a, b = flushed(form, a), flushed(form, b)
        sign = (a ^ b) & top
        if "xorsign" in modifiers:
            a, b = a & ~top, b & ~top
        numbers = [p for p in (a, b) if form.decode(p) is not None]
        if not numbers or ("NaN" in modifiers and len(numbers) < 2):
            return form.nan
        result = (min if opcode == "min" else max)(numbers, key=lambda p: key(form, p))
        return result | sign if "xorsign" in modifiers else result

    check(kind, f"{opcode}{modifiers}", grid(form, 2), expected, packed=form.bits == 16)


PROPERTIES = {
    "finite": lambda form, value: value is not None and value.magnitude is not None,
    "infinite": lambda form, value: value is not None and value.magnitude is None,
    "number": lambda form, value: value is not None,
    "notanumber": lambda form, value: value is None,
    "normal": lambda form, value: (
        value is not None
        and value.magnitude is not None
        and not 0 < value.magnitude < Fraction(2) ** form.min_exponent
    ),
    "subnormal": lambda form, value: (
        value is not None
        and value.magnitude is not None
        and 0 < value.magnitude < Fraction(2) ** form.min_exponent
    ),
}


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_properties(kind, name):
    form = FORMATS[kind]
    patterns = edges(form)
    text = f"testp.{name}.{kind} %p, %a; selp.u32 %d, 1, 0, %p;"
    got = apply(text, np.uint32, np.array(patterns, words(form))).tolist()
    assert got == [int(PROPERTIES[name](form, form.decode(pattern))) for pattern in patterns]


def sample(form: Format, low: float, high: float, count: int = 2000) -> list[int]:
    """Patterns of numbers in [low, high]: evenly spread, and as many spread evenly over the exponents."""
    generator = np.random.default_rng(1)
    numbers = list(generator.uniform(low, high, count))
    if low >= 0:
        numbers += list(np.exp2(generator.uniform(math.log2(max(low, 2.0**-126)), math.log2(high), count)))
    return [form.encode(exact.number(Fraction(float(x)))) for x in numbers]


def as_float(form: Format, pattern: int) -> float:
    value = form.decode(pattern)
    assert value is not None
    return float(value.fraction)


# opcode, type, function, range, and the ISA's bound of the error: ("ulp" or "relative" or "absolute", size).
APPROXIMATIONS = [
    ("rcp", "f32", lambda x: 1 / x, (2.0**-120, 2.0**120), ("ulp", 1)),
    ("sqrt", "f32", math.sqrt, (0.0, 2.0**120), ("relative", 2.0**-23)),
    ("rsqrt", "f32", lambda x: 1 / math.sqrt(x), (2.0**-120, 2.0**120), ("relative", 2.0**-22.9)),
    ("sin", "f32", math.sin, (-2 * math.pi, 2 * math.pi), ("absolute", 2.0**-20.5)),
    ("cos", "f32", math.cos, (-2 * math.pi, 2 * math.pi), ("absolute", 2.0**-20.5)),
    ("lg2", "f32", math.log2, (0.5, 2.0), ("absolute", 2.0**-22)),
    ("lg2", "f32", math.log2, (2.0, 2.0**120), ("relative", 2.0**-22)),
    ("ex2", "f32", lambda x: 2.0**x, (-126.0, 126.0), ("ulp", 2)),
    ("tanh", "f32", math.tanh, (-9.0, 9.0), ("relative", 2.0**-11)),
    ("ex2", "f16", lambda x: 2.0**x, (-14.0, 15.0), ("relative", 2.0**-9.9)),
    ("tanh", "f16", math.tanh, (-6.0, 6.0), ("absolute", 2.0**-10.987)),
    ("ex2.approx.ftz", "bf16", lambda x: 2.0**x, (-120.0, 120.0), ("relative", 2.0**-7)),
    ("tanh", "bf16", math.tanh, (-6.0, 6.0), ("absolute", 2.0**-8)),
]


@pytest.mark.parametrize(("opcode", "kind", "function", "span", "bound"), APPROXIMATIONS)
def test_approximations(opcode, kind, function, span, bound):
    form = FORMATS[kind]
    patterns = sample(form, *span)
    name = opcode if "." in opcode else f"{opcode}.approx"
    got = apply(f"{name}.{kind} %d, %a;", words(form), np.array(patterns, words(form))).tolist()
    for pattern, result in zip(patterns, got, strict=True):
        right = function(as_float(form, pattern))
        error = abs(as_float(form, result) - right)
        unit = 2.0 ** (max(math.frexp(right)[1] - 1, form.min_exponent) - (form.precision - 1))
        allowed = {"ulp": bound[1] * unit, "relative": bound[1] * abs(right), "absolute": bound[1]}[bound[0]]
        assert error <= allowed, f"{name}.{kind} of {pattern:#x}: {result:#x}, an error of {error:g}"


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("opcode", ["ex2", "tanh"])
def test_packed_approximations_are_those_of_each_half(kind, opcode):
    form = FORMATS[kind]
    name = f"{opcode}.approx{'.ftz' if opcode == 'ex2' and kind == 'bf16' else ''}.{kind}"
    patterns = np.array(edges(form) + sample(form, -5, 5), np.uint16)
    one = apply(f"{name} %d, %a;", np.uint16, patterns)
    two = apply(f"{name}x2 %d, %a;", np.uint32, patterns.view(np.uint32)).view(np.uint16)
    assert one.tolist() == two.tolist()


# The ISA's tables of special operands.
INFINITY, ZERO, ONE = Number(False, None), exact.number(0), exact.number(1)
SPECIAL = {
    "rcp": [(INFINITY, ZERO), (-INFINITY, -ZERO), (ZERO, INFINITY), (-ZERO, -INFINITY)],
    "sqrt": [(INFINITY, INFINITY), (-INFINITY, None), (ZERO, ZERO), (-ZERO, -ZERO), (-ONE, None)],
    "rsqrt": [(INFINITY, ZERO), (-INFINITY, None), (ZERO, INFINITY), (-ZERO, -INFINITY), (-ONE, None)],
    "sin": [(INFINITY, None), (-INFINITY, None), (ZERO, ZERO), (-ZERO, -ZERO)],
    "cos": [(INFINITY, None), (-INFINITY, None), (ZERO, ONE), (-ZERO, ONE)],
    "lg2": [(INFINITY, INFINITY), (-INFINITY, None), (ZERO, -INFINITY), (-ZERO, -INFINITY), (-ONE, None)],
    "ex2": [(INFINITY, INFINITY), (-INFINITY, ZERO), (ZERO, ONE), (-ZERO, ONE)],
    "tanh": [(INFINITY, ONE), (-INFINITY, -ONE), (ZERO, ZERO), (-ZERO, -ZERO)],
}


@pytest.mark.parametrize("opcode", SPECIAL)
def test_special_operands(opcode):
    sources, right = zip(*SPECIAL[opcode], (None, None), strict=True)
    patterns = np.array([F32.encode(value) for value in sources], np.uint32)
    assert apply(f"{opcode}.approx.f32 %d, %a;", np.uint32, patterns).tolist() == [
        F32.encode(v) for v in right
    ]
    if opcode != "tanh":
        subnormal = np.array([1, 0x80000001], np.uint32)
        zeros = np.array([0, 0x80000000], np.uint32)
        text = f"{opcode}.approx.ftz.f32 %d, %a;"
        assert apply(text, np.uint32, subnormal).tolist() == apply(text, np.uint32, zeros).tolist()


def test_approximate_division():
    """div.full everywhere; div.approx the same but for divisors above 2^126, by which everything is zero."""
    rows = grid(F32, 2)
    rows = [row for row in rows if all(F32.decode(p) is not None for p in row)]
    sources = columns(F32, rows)
    full = apply("div.full.f32 %d, %a, %b;", np.uint32, *sources).tolist()
    approximate = apply("div.approx.f32 %d, %a, %b;", np.uint32, *sources).tolist()
    nearest = calculation(F32, exact.divide)
    for (a, b), by_full, by_reciprocal in zip(rows, full, approximate, strict=True):
        quotient = nearest(a, b)
        assert abs(by_full - quotient) <= (0 if quotient == F32.nan else 2)
        divisor = F32.decode(b)
        if divisor.magnitude is not None and divisor.magnitude > Fraction(2) ** 126:
            infinite = F32.decode(a).magnitude is None
            assert by_reciprocal == F32.nan if infinite else by_reciprocal & 0x7FFFFFFF == 0
        else:
            assert abs(by_reciprocal - quotient) <= 2


@pytest.mark.parametrize(
    ("opcode", "function"), [("rcp", lambda x: 1 / x), ("rsqrt", lambda x: 1 / math.sqrt(x))]
)
def test_gross_approximations_of_f64(opcode, function):
    """20 bits: the low words of operand and result do not exist."""
    numbers = np.exp2(np.random.default_rng(2).uniform(-1000, 1000, 500))
    got = apply(f"{opcode}.approx.ftz.f64 %d, %a;", np.uint64, numbers.view(np.uint64))
    assert not np.any(got & np.uint64(0xFFFFFFFF))
    right = np.array([function(float(x)) for x in numbers])
    assert np.all(np.abs(got.view(np.float64) - right) <= 2.0**-19 * right)
    special = np.array([0.0, -0.0, np.inf, 1e-310, np.nan]).view(np.uint64)
    low = np.array([0x7FF0000000000001], np.uint64)  # a NaN only in its low word, so infinity
    results = apply(f"{opcode}.approx.ftz.f64 %d, %a;", np.uint64, np.concatenate([special, low]))
    infinity = 0x7FF << 52
    assert results.tolist() == [infinity, infinity | 1 << 63, 0, infinity, 0x7FFFFFFF << 32, 0]


def test_inverse_square_root_of_f64():
    numbers = np.exp2(np.random.default_rng(3).uniform(-1000, 1000, 500))
    got = apply("rsqrt.approx.f64 %d, %a;", np.uint64, numbers.view(np.uint64)).tolist()

    def inverse_root(x: Value) -> Value:
        return exact.divide(exact.number(1), exact.square_root(x))

    right = [F64.encode(inverse_root(F64.decode(p))) for p in numbers.view(np.uint64).tolist()]
    assert all(abs(a - b) <= 1 for a, b in zip(got, right, strict=True))
