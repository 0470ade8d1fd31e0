"""cvt between every pair of types, against Python's integers and exact fractions rounded once."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from tests.emulator import exact, integers
from tests.emulator.exact import BF16, F16, F32, F64, TF32, Format, Value
from tests.emulator.integers import clamp, columns, dtype, width, wrap
from tests.emulator.single import apply

INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
INTEGRAL = {"rni": "rn", "rzi": "rz", "rmi": "rm", "rpi": "rp"}


def words(form: Format) -> np.dtype:
    return np.dtype(f"uint{form.bits}")


def patterns(form: Format) -> list[int]:
    """Zeros, subnormals, the ends of the range, NaNs, ties of each narrower format, and integers' ends."""
    numbers = [Fraction(0), Fraction(1), Fraction(2) ** form.min_exponent, form.largest]
    for other in (BF16, F16, TF32, F32):
        unit = Fraction(2) ** (1 - other.precision)
        smallest = Fraction(2) ** (other.min_exponent - other.precision + 1)
        numbers += [1 + unit / 2, 1 + 3 * unit / 2, 1 + unit / 2 + unit / 64, other.largest]
        numbers += [
            other.largest * (1 + unit / 4),
            other.largest * 2,
            smallest,
            smallest / 2,
            smallest * 5 / 2,
        ]
    for bits in (7, 8, 15, 16, 31, 32, 63, 64):
        numbers += [Fraction(2) ** bits + step for step in (-1, Fraction(-1, 2), 0, 1)]
    numbers += [Fraction(n, 4) for n in range(1, 14)] + [
        Fraction(5, 2) + Fraction(1, 2**20),
        Fraction(1, 2**30),
    ]
    encoded = {form.encode(exact.number(x), r) for x in numbers for r in ("rn", "rz")}
    encoded |= {1, (1 << form.stored) - 1, form.infinity, form.infinity + 1, form.nan}
    return sorted({p | sign for p in encoded for sign in (0, 1 << form.bits - 1)})


def flushed(form: Format, pattern: int) -> int:
    magnitude = pattern & (1 << form.bits - 1) - 1
    return pattern - magnitude if magnitude < 1 << form.stored else pattern


def check(
    text: str, result: np.dtype, sources: list[np.ndarray], right: list[int], form: Format | None = None
):
    got = apply(text, result, *sources).tolist()
    rows = zip(*(source.tolist() for source in sources), strict=True)
    wrong = [
        case
        for case in zip(rows, got, right, strict=True)
        if case[1] != case[2] and not (form is F64 and F64.decode(case[1]) is F64.decode(case[2]) is None)
    ]
    assert not wrong, f"{text}: {len(wrong)} wrong, first (sources, got, expected): {wrong[0]}"


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", INTEGERS)
def test_integers(source, to):
    values = integers.edges(source)
    sources = columns([(value,) for value in values], [source])
    check(f"cvt.{to}.{source} %d, %a;", dtype(to), sources, [wrap(value, to) for value in values])
    if clamp(min(values), to) != min(values) or clamp(max(values), to) != max(values):
        check(f"cvt.sat.{to}.{source} %d, %a;", dtype(to), sources, [clamp(value, to) for value in values])


@pytest.mark.parametrize("to", INTEGERS[:6])
@pytest.mark.parametrize("source", INTEGERS[:6])
def test_registers_wider_than_the_type(source, to):
    """The source's low bits count; the result is extended to its register by its own sign."""
    wide = f"{to[0]}64"
    values = [value | 0x5A << width(source) for value in integers.edges(f"u{width(source)}")]
    sources = columns([(value,) for value in values], ["u64"])
    right = [wrap(wrap(value, source), to) for value in values]
    check(f"cvt.{to}.{source} %d, %a;", dtype(wide), sources, right)


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_floating(source, to, rounding):
    form = FORMATS[to]
    near = [1 << 24, 1 << 53, 3 << 61, 257, 2049, 65504, 65519, 65520]
    values = integers.edges(source) + [wrap(n + step, source) for n in near for step in (-3, -1, 0, 1, 2, 3)]
    values += [wrap((1 << 60) + (1 << at) + step, source) for at in (7, 36, 52) for step in (-1, 0, 1)]
    sources = columns([(value,) for value in values], [source])
    right = [form.encode(exact.number(value), rounding) for value in values]
    text = f"cvt.{rounding}.{to}.{source} %d, %a;"
    if to == "bf16" and width(source) == 8:
        text = f"{{.reg .b8 %x; mov.b16 {{%x, _}}, %a; cvt.{rounding}.{to}.{source} %d, %x;}}"
    check(text, words(form), sources, right)


@pytest.mark.parametrize("rounding", INTEGRAL)
@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", FORMATS)
def test_floating_to_integers(source, to, rounding):
    form = FORMATS[source]
    # A NaN is 0, but the top bit alone where an f64 or a 64-bit integer takes part.
    nan = 1 << width(to) - 1 if source == "f64" or width(to) == 64 else 0

    def convert(pattern: int) -> int:
        value = form.decode(pattern)
        if value is None:
            return wrap(nan, to)
        if value.magnitude is None:
            return clamp(-(1 << 70) if value.negative else 1 << 70, to)
        whole = exact.round_to_integer(value.magnitude, value.negative, INTEGRAL[rounding])
        return clamp(-whole if value.negative else whole, to)

    cases = patterns(form)
    sources = [np.array(cases, words(form))]
    text = f"cvt.{rounding}.{to}.{source} %d, %a;"
    if source == "bf16" and width(to) == 8:  # bf16 goes with no register that is wider than the other type
        text = f"{{.reg .b8 %x; cvt.{rounding}.{to}.{source} %x, %a; mov.b16 %d, {{%x, 0}};}}"
    check(text, dtype(to), sources, [convert(p) for p in cases])
    if source == "f32":
        right = [convert(flushed(form, p)) for p in cases]
        check(f"cvt.{rounding}.ftz.{to}.{source} %d, %a;", dtype(to), sources, right)


def test_floating_to_a_wider_register():
    got = apply("cvt.rzi.s8.f32 %d, %a;", np.int32, np.array([-3.7, 200.0, -1e9], np.float32).view(np.uint32))
    assert got.tolist() == [-3, 127, -128]


NARROWINGS = [("f64", "f32"), ("f64", "f16"), ("f64", "bf16"), ("f32", "f16"), ("f32", "bf16")]
NARROWINGS += [("f16", "bf16"), ("bf16", "f16")]


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("source", "to"), NARROWINGS)
def test_narrowing(source, to, rounding):
    form, result = FORMATS[source], FORMATS[to]
    cases = patterns(form)
    sources = [np.array(cases, words(form))]
    right = [result.encode(form.decode(p), rounding) for p in cases]
    check(f"cvt.{rounding}.{to}.{source} %d, %a;", words(result), sources, right)
    if to in ("f16", "f32") and source != "bf16":
        right = [result.encode(exact.clamp_to_unit(form.decode(p)), rounding) for p in cases]
        check(f"cvt.{rounding}.sat.{to}.{source} %d, %a;", words(result), sources, right)
    if "f32" in (source, to):
        right = [
            result.encode(form.decode(flushed(form, p) if source == "f32" else p), rounding) for p in cases
        ]
        right = [flushed(result, p) if to == "f32" else p for p in right]
        check(f"cvt.{rounding}.ftz.{to}.{source} %d, %a;", words(result), sources, right)


@pytest.mark.parametrize(
    ("to", "source"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16"), ("f64", "f32")]
)
def test_widening(source, to):
    form, result = FORMATS[source], FORMATS[to]
    cases = patterns(form)
    right = [result.encode(form.decode(p)) for p in cases]
    check(f"cvt.{to}.{source} %d, %a;", words(result), [np.array(cases, words(form))], right, result)


@pytest.mark.parametrize("rounding", INTEGRAL)
@pytest.mark.parametrize("kind", FORMATS)
def test_rounding_to_integral_values(kind, rounding):
    form = FORMATS[kind]

    def convert(pattern: int) -> int:
        value = form.decode(pattern)
        if value is None or value.magnitude is None:
            return form.encode(value)
        whole = exact.round_to_integer(value.magnitude, value.negative, INTEGRAL[rounding])
        return form.encode(exact.Number(value.negative, Fraction(whole)))

    cases = patterns(form)
    right = [convert(p) for p in cases]
    check(f"cvt.{rounding}.{kind}.{kind} %d, %a;", words(form), [np.array(cases, words(form))], right, form)


def narrowed(form: Format, value: Value, rounding: str, modifiers: str) -> int:
    pattern = form.encode(value, rounding, satfinite="satfinite" in modifiers)
    return form.encode(exact.clamp_to_positive(form.decode(pattern))) if "relu" in modifiers else pattern


@pytest.mark.parametrize("modifiers", ["", ".relu", ".satfinite", ".relu.satfinite"])
@pytest.mark.parametrize("rounding", ["rn", "rz"])
@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_from_f32(to, rounding, modifiers):
    form = FORMATS[to]
    cases = patterns(F32)
    upper, lower = np.array(cases, np.uint32), np.array(cases[::-1], np.uint32)
    right = [narrowed(form, F32.decode(p), rounding, modifiers) for p in cases]
    check(f"cvt.{rounding}{modifiers}.{to}.f32 %d, %a;", words(form), [upper], right)
    pairs = [high << 16 | low for high, low in zip(right, right[::-1], strict=True)]
    check(f"cvt.{rounding}{modifiers}.{to}x2.f32 %d, %a, %b;", np.dtype("uint32"), [upper, lower], pairs)


@pytest.mark.parametrize(
    "modifiers", ["rna", "rna.satfinite", "rn", "rz", "rn.relu", "rz.satfinite", "rn.satfinite.relu"]
)
def test_tf32(modifiers):
    cases = patterns(F32)
    right = [narrowed(TF32, F32.decode(p), modifiers.split(".")[0], modifiers) for p in cases]
    check(f"cvt.{modifiers}.tf32.f32 %d, %a;", np.dtype("uint32"), [np.array(cases, np.uint32)], right)


@pytest.mark.parametrize("to", ["u16", "s16", "u8", "s8"])
def test_packing_of_integers(to):
    bits = width(to)
    kinds = ["s32", "s32", "b32"]
    rows = list(itertools.product(*(integers.edges(kind) for kind in kinds)))[::19]

    def pack(a: int, b: int, c: int) -> int:
        pair = (clamp(a, to) % (1 << bits)) << bits | clamp(b, to) % (1 << bits)
        return pair | (c & 0xFFFF) << 16 if bits == 8 else pair

    text = f"cvt.pack.sat.{to}.s32.b32 %d, %a, %b, %c;" if bits == 8 else f"cvt.pack.sat.{to}.s32 %d, %a, %b;"
    integers.check(text, "b32", kinds, pack, rows)
