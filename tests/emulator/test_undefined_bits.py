"""Which bits of a result are undefined.

Undefined bits of the sources stand for every value that they could have. A bit of the result that these
values change must be undefined, or a use of uninitialised data would pass unseen; where the ISA's operation
moves or combines bits one by one, no other bit may be, or correct programs would be accused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.emulator.single import apply, undefined_bits

Source = tuple[int, int, int]  # width, value, undefined bits


def completions(source: Source) -> list[int]:
    """The values that the source may have."""
    _, value, undefined = source
    places = [i for i in range(64) if undefined >> i & 1]
    base = value & ~undefined
    return [
        base | sum(bit << i for bit, i in zip(bits, places, strict=True))
        for bits in itertools.product((0, 1), repeat=len(places))
    ]


def changing_bits(instruction: str, width: int, *sources: Source) -> int:
    rows = list(itertools.product(*(completions(source) for source in sources)))
    columns = [
        np.array(column, f"uint{source[0]}")
        for column, source in zip(zip(*rows, strict=True), sources, strict=True)
    ]
    results = apply(instruction, f"uint{width}", *columns)
    return int(np.bitwise_or.reduce(results) & ~np.bitwise_and.reduce(results))


def source(width: int) -> st.SearchStrategy[Source]:
    """Any value with up to four undefined bits, which are more often together than apart."""
    value = st.integers(0, (1 << width) - 1) | st.sampled_from([0, 1, (1 << width) - 1, 1 << width - 1])
    apart = st.sets(st.integers(0, width - 1), max_size=4).map(lambda places: sum(1 << i for i in places))
    together = st.builds(
        lambda n, at: ((1 << n) - 1 << at) & (1 << width) - 1, st.integers(1, 4), st.integers(0, width - 1)
    )
    return st.tuples(st.just(width), value, st.just(0) | apart | together)


def defined(width: int, values: list[int]) -> st.SearchStrategy[Source]:
    return st.tuples(st.just(width), st.sampled_from(values), st.just(0))


AMOUNTS = [0, 1, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 100]


def amount() -> st.SearchStrategy[Source]:
    """A count, position or selection, with an undefined bit or two where they matter."""
    return st.tuples(st.just(32), st.sampled_from(AMOUNTS), st.sampled_from([0, 1, 2, 6, 16, 32, 64]))


AMOUNT = -1
# The instruction, the width of the result, and of each source its width, AMOUNT, or the values it may have.
Case = tuple[str, int, list[int | list[int]]]


def cases(
    text: str, width: str | int, *sources: str | int | list[int], **choices: Iterable[int | str]
) -> list[Case]:
    """One case for each combination of the choices, which the text and the widths name."""
    rows: list[Case] = []
    for values in itertools.product(*choices.values()):
        chosen: dict[str, Any] = dict(zip(choices, values, strict=True))
        shapes = [chosen[s] if isinstance(s, str) else s for s in sources]
        rows.append((text.format(**chosen), chosen[width] if isinstance(width, str) else width, shapes))
    return rows


WIDTHS = (16, 32, 64)
SIGNS = "us"
PERMUTATIONS = ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
LOGIC = ("and", "or", "xor")
EXACT: list[Case] = [
    *cases("{op}.b{w} %d, %a, %b;", "w", "w", "w", op=LOGIC, w=WIDTHS),
    *cases("{op}.b{w} %d, %a;", "w", "w", op=("not", "cnot", "mov"), w=WIDTHS),
    *cases("lop3.b32 %d, %a, %b, %c, {t};", 32, 32, 32, 32, t=(0x1A, 0x40, 0x96, 0xCA, 0xE8, 0xFF)),
    *cases("shl.b{w} %d, %a, %b;", "w", "w", AMOUNTS, w=WIDTHS),
    *cases("shr.{t}{w} %d, %a, %b;", "w", "w", AMOUNTS, t=SIGNS, w=WIDTHS),
    *cases("shf.{d}.{m}.b32 %d, %a, %b, %c;", 32, 32, 32, AMOUNTS, d="lr", m=("clamp", "wrap")),
    ("prmt.b32 %d, %a, %b, %c;", 32, [32, 32, [0x3210, 0x5410, 0x7632, 0xFBA9, 0x8888, 0x1032]]),
    *cases("prmt.b32.{m} %d, %a, %b, %c;", 32, 32, 32, [0, 1, 2, 3], m=PERMUTATIONS),
    *cases("brev.b{w} %d, %a;", "w", "w", w=(32, 64)),
    *cases("bfe.{t}{w} %d, %a, %b, %c;", "w", "w", AMOUNTS, AMOUNTS, t=SIGNS, w=(32, 64)),
    *cases("bfi.b{w} %d, %a, %b, %c, %e;", "w", "w", "w", AMOUNTS, AMOUNTS, w=(32, 64)),
    *cases("szext.{m}.{t}32 %d, %a, %b;", 32, 32, AMOUNTS, m=("clamp", "wrap"), t=SIGNS),
    ("mov.b32 %d, {%a, %b};", 32, [16, 16]),
    ("mov.b64 %d, {%a, %b};", 64, [32, 32]),
    ("{.reg .b16 %x, %y; mov.b32 {%x, %y}, %a; mov.b32 %d, {%y, %x};}", 32, [32]),
    *cases("cvt.u{w}.{t}{v} %d, %a;", "w", "v", w=WIDTHS, v=WIDTHS, t=SIGNS),
    ("cvt.s8.s16 %d, %a;", 32, [16]),
    *cases("{op}.f{w} %d, %a;", "w", "w", op=("neg", "abs"), w=WIDTHS),
    *cases("{op}.bf16x2 %d, %a;", 32, 32, op=("neg", "abs")),
    ("copysign.f32 %d, %a, %b;", 32, [32, 32]),
    # Comparisons and predicates, by the single bit that they decide.
    *cases("setp.{op}.b{w} %p, %a, %b; selp.u32 %d, 1, 0, %p;", 32, "w", "w", op=("eq", "ne"), w=WIDTHS),
    *cases(
        "setp.{op}.{t}{w} %p, %a, %b; selp.u32 %d, 1, 0, %p;",
        *(32, "w", "w"),
        op=("lt", "le", "gt", "ge"),
        t=SIGNS,
        w=WIDTHS,
    ),
    ("set.lt.u32.s32 %d, %a, %b;", 32, [32, 32]),
    ("set.ge.f32.u32 %d, %a, %b;", 32, [32, 32]),
    *cases(
        "setp.ne.b32 %q, %a, 0; setp.ne.b32 %r, %b, 0; {op}.pred %p, %q, %r; selp.u32 %d, 1, 0, %p;",
        *(32, 32, 32),
        op=LOGIC,
    ),
    *cases(
        "setp.ne.b32 %r, %c, 0; setp.lt.{op}.u32 _|%q, %a, %b, !%r; selp.u32 %d, 1, 0, %q;",
        *(32, 32, 32, 32),
        op=LOGIC,
    ),
    *cases("setp.ne.b32 %p, %c, 0; selp.b{w} %d, %a, %b, %p;", "w", "w", "w", 32, w=WIDTHS),
    ("slct.b32.s32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    (
        "setp.ne.u32 %q, %c, 0; lop3.or.b32 _|%p, %a, %b, %c, 0xC0, %q; selp.u32 %d, 1, 0, %p;",
        32,
        [32, 32, [0]],
    ),
]

# Where an undefined bit may spoil more than it must, but never less.
SAFE: list[Case] = [
    *cases("{op}.{t}{w} %d, %a, %b;", "w", "w", "w", op=("div", "rem", "min", "mul.hi"), t=SIGNS, w=WIDTHS),
    *cases("{op}.u{w} %d, %a, %b;", "w", "w", "w", op=("add", "sub", "mul.lo"), w=WIDTHS),
    *cases("mad.lo.s{w} %d, %a, %b, %c;", "w", "w", "w", "w", w=WIDTHS),
    ("mul.wide.s16 %d, %a, %b;", 32, [16, 16]),
    ("mad.wide.u32 %d, %a, %b, %c;", 64, [32, 32, 64]),
    ("mul24.hi.u32 %d, %a, %b;", 32, [32, 32]),
    ("sad.s32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("add.u16x2 %d, %a, %b;", 32, [32, 32]),
    ("dp4a.s32.u32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("abs.s32 %d, %a;", 32, [32]),
    ("neg.s64 %d, %a;", 64, [64]),
    ("popc.b64 %d, %a;", 32, [64]),
    ("clz.b32 %d, %a;", 32, [32]),
    ("bfind.s32 %d, %a;", 32, [32]),
    *cases("bmsk.{m}.b32 %d, %a, %b;", 32, AMOUNT, AMOUNT, m=("clamp", "wrap")),
    ("fns.b32 %d, %a, %b, 1;", 32, [32, AMOUNT]),
    *cases("shl.b{w} %d, %a, %b;", "w", "w", AMOUNT, w=WIDTHS),
    *cases("shr.{t}{w} %d, %a, %b;", "w", "w", AMOUNT, t=SIGNS, w=WIDTHS),
    *cases("shf.{d}.{m}.b32 %d, %a, %b, %c;", 32, 32, 32, AMOUNT, d="lr", m=("clamp", "wrap")),
    ("prmt.b32 %d, %a, %b, %c;", 32, [32, 32, AMOUNT]),
    *cases("prmt.b32.{m} %d, %a, %b, %c;", 32, 32, 32, AMOUNT, m=PERMUTATIONS),
    *cases("bfe.{t}32 %d, %a, %b, %c;", 32, 32, AMOUNT, AMOUNT, t=SIGNS),
    *cases("bfi.b{w} %d, %a, %b, %c, %e;", "w", "w", "w", AMOUNT, AMOUNT, w=(32, 64)),
    *cases("szext.{m}.s32 %d, %a, %b;", 32, 32, AMOUNT, m=("clamp", "wrap")),
    ("add.rn.f32 %d, %a, %b;", 32, [32, 32]),
    ("fma.rn.f16x2 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("ex2.approx.ftz.f32 %d, %a;", 32, [32]),
    ("max.f32 %d, %a, %b;", 32, [32, 32]),
    ("setp.lt.f32 %p, %a, %b; selp.u32 %d, 1, 0, %p;", 32, [32, 32]),
    ("setp.neu.f16x2 %p|%q, %a, %b; selp.u32 %d, 1, 0, %q;", 32, [32, 32]),
    ("slct.b32.f32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("testp.subnormal.f32 %p, %a; selp.u32 %d, 1, 0, %p;", 32, [32]),
    ("cvt.sat.s16.s32 %d, %a;", 16, [32]),
    ("cvt.rn.bf16x2.f32 %d, %a, %b;", 32, [32, 32]),
    ("cvt.rzi.u64.f32 %d, %a;", 64, [32]),
    ("cvt.f32.f16 %d, %a;", 32, [16]),
    ("cvt.pack.sat.u8.s32.b32 %d, %a, %b, %c;", 32, [32, 32, 32]),
    ("add.cc.u32 %d, %a, %b; addc.u32 %d, %c, 0;", 32, [32, 32, 32]),
    ("cvta.shared.u64 %d, %a;", 64, [64]),
    ("isspacep.shared %p, %a; selp.u32 %d, 1, 0, %p;", 32, [64]),
]


def draw(data: st.DataObject, shapes: list[int | list[int]]) -> list[Source]:
    sources = []
    for shape in shapes:
        if isinstance(shape, list):
            sources.append(data.draw(defined(32, shape)))
        else:
            sources.append(data.draw(amount() if shape == AMOUNT else source(shape)))
    return sources


@pytest.mark.parametrize(("instruction", "width", "shapes"), EXACT, ids=[case[0] for case in EXACT])
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_bit_by_bit(instruction, width, shapes, data):
    sources = draw(data, shapes)
    assert undefined_bits(instruction, width, *sources) == changing_bits(instruction, width, *sources)


@pytest.mark.parametrize(("instruction", "width", "shapes"), SAFE, ids=[case[0] for case in SAFE])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_nothing_passes_unseen(instruction, width, shapes, data):
    sources = draw(data, shapes)
    undefined = undefined_bits(instruction, width, *sources)
    assert changing_bits(instruction, width, *sources) & ~undefined == 0
    if all(mask == 0 for _, _, mask in sources):
        assert undefined == 0


@pytest.mark.parametrize(
    ("instruction", "width", "sources", "undefined"),
    [
        # Carries go upwards only.
        ("add.u32 %d, %a, %b;", 32, [(32, 5, 0xFF00), (32, 1, 0)], 0xFFFFFF00),
        ("mul.lo.u32 %d, %a, %b;", 32, [(32, 5, 0x80000000), (32, 3, 0)], 0x80000000),
        ("add.cc.u32 %d, %a, %b; addc.u32 %d, 0, 0;", 32, [(32, 0xFFFFFFFF, 0), (32, 0, 1)], 0xFFFFFFFF),
        # The halves of packed types, and of pairs, are apart.
        ("add.u16x2 %d, %a, %b;", 32, [(32, 5, 0xFF00), (32, 1, 0)], 0xFF00),
        ("fma.rn.bf16x2 %d, %a, %b, %a;", 32, [(32, 5, 0x10000), (32, 1, 0)], 0xFFFF0000),
        ("cvt.rn.f16x2.f32 %d, %a, %b;", 32, [(32, 5, 1), (32, 1, 0)], 0xFFFF0000),
        # Bits that are not looked at do no harm.
        ("bfe.u32 %d, %a, %b, %c;", 32, [(32, 5, 0xF0), (32, 0, 0xF00), (32, 4, 0)], 0),
        ("cvt.u16.u32 %d, %a;", 16, [(32, 5, 0xFFFF0000)], 0),
        ("cvt.f32.f16 %d, %a;", 32, [(32, 5, 0xFFFF0000)], 0),
        ("mul.wide.u16 %d, %a, %b;", 32, [(16, 0, 0), (16, 9, 0)], 0),
        ("cvta.shared.u64 %d, %a;", 64, [(64, 5, 0xF0)], 0xF0),
        # A wide register's extension is as defined as what it copies.
        ("cvt.s8.s16 %d, %a;", 32, [(16, 5, 0x80)], 0xFFFFFF80),
        ("cvt.u8.s16 %d, %a;", 32, [(16, 5, 0x80)], 0x80),
        ("cvt.rzi.u8.f32 %d, %a;", 32, [(32, 5, 0x80)], 0xFF),
    ],
)
def test_known_cases(instruction, width, sources, undefined):
    assert undefined_bits(instruction, width, *sources) == undefined
