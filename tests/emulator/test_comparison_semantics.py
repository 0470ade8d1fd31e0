"""Comparisons, selections and moves."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tests.emulator.exact import BF16, F16, F32, F64, Format
from tests.emulator.integers import check, columns, dtype, edges, grid
from tests.emulator.single import apply

FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
BOOLEAN = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
INTEGERS = ["b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64"]


def integer_comparisons(kind: str) -> Mapping[str, Callable[..., Any]]:
    if kind[0] == "b":
        return {"eq": operator.eq, "ne": operator.ne}
    return ORDERED | UNSIGNED if kind[0] == "u" else ORDERED


@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_comparisons(kind):
    for name, compare in integer_comparisons(kind).items():
        text = f"setp.{name}.{kind} %p, %a, %b; selp.u32 %d, 1, 0, %p;"
        check(text, "u32", [kind, kind], compare)


@pytest.mark.parametrize("boolean", BOOLEAN)
@pytest.mark.parametrize("negation", ["", "!"])
def test_combined_comparisons(boolean, negation):
    """p = (a < b) op c, q = !(a < b) op c."""
    combine = BOOLEAN[boolean]

    def both(a: int, b: int, c: int) -> int:
        third = bool(c) != bool(negation)
        return combine(a < b, third) + 2 * combine(a >= b, third)

    text = (
        f"setp.ne.u32 %r, %c, 0; setp.lt.{boolean}.s32 %p|%q, %a, %b, {negation}%r;"
        "selp.u32 %d, 1, 0, %p; selp.u32 %c, 2, 0, %q; or.b32 %d, %d, %c;"
    )
    rows = [(a, b, c) for a, b in grid("s32", "s32")[::7] for c in (0, 1)]
    check(text, "u32", ["s32", "s32", "u32"], both, rows)


def test_both_destinations():
    text = "setp.eq.u32 %p|%q, %a, %b; selp.u32 %d, 1, 0, %p; selp.u32 %a, 2, 0, %q; or.b32 %d, %d, %a;"
    check(text, "u32", ["u32", "u32"], lambda a, b: 1 if a == b else 2)
    check("setp.eq.u32 _|%q, %a, %b; selp.u32 %d, 1, 0, %q;", "u32", ["u32", "u32"], operator.ne)


def patterns(form: Format) -> list[int]:
    one = form.encode(F32.decode(0x3F800000))
    magnitudes = [0, 1, (1 << form.stored) - 1, 1 << form.stored, one, one + 1, form.infinity - 1]
    magnitudes += [form.infinity, form.infinity + 1, form.nan]
    return [m | sign for m in magnitudes for sign in (0, 1 << form.bits - 1)]


def order(form: Format, a: int, b: int, ftz: bool) -> tuple[bool, bool, bool]:
    """Less, equal, greater: none of them holds of a NaN."""
    values = []
    for pattern in (a, b):
        magnitude = pattern & (1 << form.bits - 1) - 1
        if magnitude > form.infinity:
            return False, False, False
        magnitude = 0 if ftz and magnitude < 1 << form.stored else magnitude
        values.append(-magnitude if pattern >> form.bits - 1 else magnitude)  # patterns order as numbers
    return values[0] < values[1], values[0] == values[1], values[0] > values[1]


def float_comparison(name: str, less: bool, equal: bool, greater: bool) -> bool:
    unordered = not (less or equal or greater)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    holds = {
        "eq": equal,
        "ne": less or greater,
        "lt": less,
        "le": less or equal,
        "gt": greater,
        "ge": greater or equal,
    }
    return holds[name[:2]] or (len(name) == 3 and unordered)


FLOAT_COMPARISONS = [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"]


@pytest.mark.parametrize("name", FLOAT_COMPARISONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_floating_comparisons(kind, name):
    form = FORMATS[kind]
    rows = list(itertools.product(patterns(form), repeat=2))
    sources = [np.array(column, f"uint{form.bits}") for column in zip(*rows, strict=True)]
    for ftz in (False, True) if kind in ("f16", "f32") else (False,):
        right = [float_comparison(name, *order(form, a, b, ftz)) for a, b in rows]
        stem = f"{name}{'.ftz' if ftz else ''}"
        text = f"setp.{stem}.{kind} %p, %a, %b; selp.u32 %d, 1, 0, %p;"
        assert apply(text, np.uint32, *sources).tolist() == right, text
        assert apply(f"set.{stem}.u32.{kind} %d, %a, %b;", np.uint32, *sources).tolist() == [
            0xFFFFFFFF * value for value in right
        ]
        if form.bits != 16:
            assert apply(f"set.{stem}.f32.{kind} %d, %a, %b;", np.float32, *sources).tolist() == right
        if form.bits == 16:
            pairs = [source.view(np.uint32) for source in sources]
            text = (
                f"setp.{stem}.{kind}x2 %p|%q, %a, %b; selp.u32 %d, 1, 0, %p;"
                "selp.u32 %a, 0x10000, 0, %q; or.b32 %d, %d, %a;"
            )
            assert apply(text, np.uint32, *pairs).view(np.uint16).tolist() == right, text
            one = form.encode(F32.decode(0x3F800000))
            text = f"set.{stem}.{kind}x2.{kind}x2 %d, %a, %b;"
            assert apply(text, np.uint32, *pairs).view(np.uint16).tolist() == [one * value for value in right]
            text = f"set.{stem}.{kind}.{kind} %d, %a, %b;"
            assert apply(text, np.uint16, *sources).tolist() == [one * value for value in right]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64", "u16", "s16"])
def test_set(kind):
    for name, compare in ORDERED.items():
        check(f"set.{name}.u32.{kind} %d, %a, %b;", "u32", [kind, kind], lambda a, b, f=compare: -f(a, b))
        check(
            f"set.{name}.f32.{kind} %d, %a, %b;",
            "u32",
            [kind, kind],
            lambda a, b, f=compare: 0x3F800000 * f(a, b),
        )
    check(
        f"setp.gt.{kind} %r, %a, 5; set.lt.xor.s32.{kind} %d, %a, %b, !%r;",
        "s32",
        [kind, kind],
        lambda a, b: -((a < b) ^ (a <= 5)),
    )


@pytest.mark.parametrize(
    "kind", ["b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64"]
)
def test_selections(kind):
    word = f"b{kind.lstrip('busf')}"
    kinds = [word, word, "s32"]
    rows = [(a, b, c) for a, b in grid(word, word)[::9] for c in (-(1 << 31), -1, 0, 1)]
    select = f"setp.ge.s32 %p, %c, 0; selp.{kind} %d, %a, %b, %p;"
    check(select, word, kinds, lambda a, b, c: a if c >= 0 else b, rows)
    check(f"slct.{kind}.s32 %d, %a, %b, %c;", word, kinds, lambda a, b, c: a if c >= 0 else b, rows)


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_selections_by_floats(ftz):
    cases = {
        0x3F800000: True,
        0x00000001: True,
        0: True,
        0x80000000: True,
        0x80000001: bool(ftz),
        0xBF800000: False,
    }
    cases |= {0x7F800000: True, 0xFF800000: False, 0x7FC00000: False, 0xFFC00000: False}
    rows = [(3, 4, c) for c in cases]
    check(
        f"slct{ftz}.u32.f32 %d, %a, %b, %c;", "u32", ["u32"] * 3, lambda a, b, c: a if cases[c] else b, rows
    )


MOVES = ["b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"]


@pytest.mark.parametrize("kind", MOVES)
def test_moves(kind):
    word = f"b{kind.lstrip('busf')}"
    check(f"mov.{kind} %d, %a;", word, [word], lambda a: a)


def test_literals():
    a = np.zeros(40, np.uint32)
    assert set(apply("mov.f32 %d, 0f3FC00000;", np.float32, a).tolist()) == {1.5}
    assert set(apply("mov.f64 %d, 0dBFF8000000000000;", np.float64, a).tolist()) == {-1.5}
    assert set(apply("mov.f32 %d, 0.1;", np.float32, a).tolist()) == {float(np.float32(0.1))}
    assert set(apply("mov.b64 %d, -2;", np.int64, a).tolist()) == {-2}
    assert set(apply("mov.b32 %d, 0xfffffff0U;", np.uint32, a).tolist()) == {0xFFFFFFF0}
    assert set(apply("add.s32 %d, %a, -7;", np.int32, a).tolist()) == {-7}


def test_special_registers():
    a = np.zeros(300, np.uint32)
    assert apply("mov.u32 %d, %tid.x;", np.uint32, a).tolist() == [i % 256 for i in range(300)]
    assert apply("mov.u32 %d, %ctaid.x;", np.uint32, a).tolist() == [i // 256 for i in range(300)]
    assert apply("mov.u32 %d, %laneid;", np.uint32, a).tolist() == [i % 32 for i in range(300)]


@pytest.mark.parametrize(("whole", "part"), [(32, 16), (64, 32), (64, 16)])
def test_vectors(whole, part):
    """Elements lie from the lowest bits up; `_` leaves one out."""
    count = whole // part
    values = edges(f"b{whole}")
    names = [f"%x{i}" for i in range(count)]
    elements = ", ".join(names)
    declare = f"{{.reg .b{part} {elements}; "
    rows = [(value,) for value in values]
    mask = (1 << part) - 1
    for i in range(count):
        chosen = ", ".join(name if i == j else "_" for j, name in enumerate(names))
        text = f"{declare}mov.b{whole} {{{chosen}}}, %a; mov.b{part} %d, %x{i};}}"
        check(text, f"b{part}", [f"b{whole}"], lambda a, i=i: a >> part * i & mask, rows)
    reverse = ", ".join(reversed(names))
    text = f"{declare}mov.b{whole} {{{elements}}}, %a; mov.b{whole} %d, {{{reverse}}};}}"

    def reversed_elements(a: int) -> int:
        return sum((a >> part * i & mask) << part * (count - 1 - i) for i in range(count))

    check(text, f"b{whole}", [f"b{whole}"], reversed_elements, rows)
    with_literal = ", ".join(["7", *names[1:]])
    text = f"{declare}mov.b{whole} {{{elements}}}, %a; mov.b{whole} %d, {{{with_literal}}};}}"
    check(text, f"b{whole}", [f"b{whole}"], lambda a: a & ~mask | 7, rows)


@pytest.mark.parametrize("space", ["shared", "shared::cta", "local", "global", "param", "const"])
def test_addresses_there_and_back(space):
    offsets = [(value,) for value in (0, 16, 1024, 0xFFFF, (1 << 31) + 8)]
    text = f"cvta.{space}.u64 %d, %a; cvta.to.{space}.u64 %d, %d;"
    check(text, "u64", ["u64"], lambda a: a, offsets)


def test_state_spaces_are_apart():
    """An address in one window is in no other; parameters are within the global window."""
    spaces = ["shared", "local", "param", "global"]
    a = np.array([1 << 20], np.uint64)  # a global address is generic as it is
    for space, other in itertools.product(spaces, spaces):
        text = f"cvta.{space}.u64 %a, %a; isspacep.{other} %p, %a; selp.u32 %d, 1, 0, %p;"
        inside = space == other or (space, other) == ("param", "global")
        assert apply(text, np.uint32, a).tolist() == [inside], text


def test_addresses_of_variables():
    text = (
        "{.shared .align 16 .b8 first[32]; .shared .align 16 .b8 second[32]; .reg .b32 %s, %t; .reg .b64 %g;"
        "mov.u32 %s, first; mov.u32 %t, second+4; sub.u32 %t, %t, %s;"
        "cvta.shared.u64 %g, first+8; cvta.to.shared.u64 %g, %g; cvt.u32.u64 %d, %g; sub.u32 %d, %d, %s;"
        "shl.b32 %t, %t, 8; or.b32 %d, %d, %t;}"
    )
    result = apply(text, np.uint32, np.zeros(1, np.uint32))[0]
    assert result & 0xFF == 8
    assert (result >> 8) - (1 << 32 if result >> 31 else 0) in (36, -28)  # the order is not ours to say


def test_columns_keep_values():
    """The cases reach the kernel as they are."""
    kinds = ["s64", "u16"]
    rows = grid(*kinds)
    back = [tuple(row) for row in zip(*(column.tolist() for column in columns(rows, kinds)), strict=True)]
    assert back == rows
    assert columns(rows, kinds)[0].dtype == dtype("s64")
