"""Bit fields, logic and shifts, against Python's integers and the ISA's own definitions of each bit."""

from __future__ import annotations

import itertools

import pytest

from tests.emulator.integers import check, edges, grid, width, wrap

LENGTHS = [0, 1, 2, 5, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 255, 256, 257, 1 << 31, (1 << 32) - 1]


def fields(*kinds: str, lengths: int) -> list[tuple[int, ...]]:
    """Edge values for the first operands, positions and lengths for the last."""
    rows = itertools.product(*(edges(kind) for kind in kinds), *[LENGTHS] * lengths)
    return list(rows)[:: 1 if lengths + len(kinds) < 3 else 13]


def bit(value: int, at: int) -> int:
    return value >> at & 1


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits):
    kind = f"b{bits}"
    check(f"popc.{kind} %d, %a;", "b32", [kind], int.bit_count)
    check(f"clz.{kind} %d, %a;", "b32", [kind], lambda a: bits - a.bit_length())
    check(f"brev.{kind} %d, %a;", kind, [kind], lambda a: int(f"{a:0{bits}b}"[::-1], 2))
    for sign in "us":
        t = f"{sign}{bits}"

        def highest(a: int) -> int:
            return (~a if a < 0 else a).bit_length() - 1

        check(f"bfind.{t} %d, %a;", "b32", [t], highest)
        check(
            f"bfind.shiftamt.{t} %d, %a;",
            "b32",
            [t],
            lambda a: bits - 1 - highest(a) if highest(a) >= 0 else -1,
        )


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_extracted_fields(kind):
    top = width(kind) - 1

    def extract(a: int, position: int, length: int) -> int:
        position, length = position & 0xFF, length & 0xFF
        sign = 0 if kind[0] == "u" or length == 0 else bit(a, min(position + length - 1, top))
        taken = [bit(a, position + i) if i < length and position + i <= top else sign for i in range(top + 1)]
        return sum(value << i for i, value in enumerate(taken))

    check(f"bfe.{kind} %d, %a, %b, %c;", kind, [kind, "u32", "u32"], extract, fields(kind, lengths=2))


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_inserted_fields(kind):
    top = width(kind) - 1

    def insert(a: int, b: int, position: int, length: int) -> int:
        position, length = position & 0xFF, length & 0xFF
        for i in range(length):
            if position + i <= top:
                b = b & ~(1 << position + i) | bit(a, i) << position + i
        return b

    rows = fields(kind, kind, lengths=2)
    check(f"bfi.{kind} %d, %a, %b, %c, %e;", kind, [kind, kind, "u32", "u32"], insert, rows)


def test_masks():
    def mask(position: int, size: int) -> int:
        return ((1 << min(size, 32)) - 1) << min(position, 32)

    rows = fields(lengths=2)
    check("bmsk.clamp.b32 %d, %a, %b;", "b32", ["u32", "u32"], mask, rows)
    check("bmsk.wrap.b32 %d, %a, %b;", "b32", ["u32", "u32"], lambda a, b: mask(a & 31, b & 31), rows)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_extensions(kind):
    def extend(a: int, count: int) -> int:
        return 0 if count == 0 else wrap(a, f"{kind[0]}{min(count, 32)}")

    rows = fields(kind, lengths=1)
    check(f"szext.clamp.{kind} %d, %a, %b;", kind, [kind, "u32"], extend, rows)
    check(f"szext.wrap.{kind} %d, %a, %b;", kind, [kind, "u32"], lambda a, b: extend(a, b & 31), rows)


def test_nth_set_bit():
    def find(mask: int, base: int, offset: int) -> int:
        places = [i for i in range(32) if bit(mask, i)]
        if offset == 0:
            return base if base in places else -1
        places = [i for i in places if i >= base] if offset > 0 else [i for i in places[::-1] if i <= base]
        return places[abs(offset) - 1] if abs(offset) <= len(places) else -1

    offsets = [-(1 << 31), -33, -5, -2, -1, 0, 1, 2, 3, 17, 32, (1 << 31) - 1]
    rows = list(itertools.product([*edges("u32"), 0xAAAAAAAA], [0, 1, 3, 30, 31], offsets))
    check("fns.b32 %d, %a, %b, %c;", "b32", ["u32", "u32", "s32"], find, rows)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind):
    two = [kind, kind]
    check(f"and.{kind} %d, %a, %b;", kind, two, lambda a, b: a & b)
    check(f"or.{kind} %d, %a, %b;", kind, two, lambda a, b: a | b)
    check(f"xor.{kind} %d, %a, %b;", kind, two, lambda a, b: a ^ b)
    check(f"not.{kind} %d, %a;", kind, [kind], lambda a: ~a)
    check(f"cnot.{kind} %d, %a;", kind, [kind], lambda a: a == 0)


@pytest.mark.parametrize("table", [0x00, 0x1A, 0x40, 0x80, 0x96, 0xC0, 0xCA, 0xE8, 0xF0, 0xFE, 0xFF])
def test_three_input_logic(table):
    def look_up(a: int, b: int, c: int) -> int:
        rows = (4 * bit(a, i) + 2 * bit(b, i) + bit(c, i) for i in range(32))
        return sum(bit(table, row) << i for i, row in enumerate(rows))

    check(f"lop3.b32 %d, %a, %b, %c, {table};", "b32", ["b32"] * 3, look_up)
    # With a predicate: p = (d != 0) op q.
    for operation in ("and", "or"):
        compare = f"setp.gt.u32 %q, %a, %b; lop3.{operation}.b32"
        select = "selp.b32 %d, 1, 0, %p;"

        def combined(a: int, b: int, c: int, negated: bool, both: bool = operation == "and") -> bool:
            first, second = look_up(a, b, c) != 0, (a > b) != negated
            return first and second if both else first or second

        for destination, q in (("%d", "%q"), ("_", "!%q")):
            check(
                f"{compare} {destination}|%p, %a, %b, %c, {table}, {q}; {select}",
                "b32",
                ["b32"] * 3,
                lambda a, b, c, combined=combined, negated=q == "!%q": combined(a, b, c, negated),
            )


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    for kind, opcode in ((f"b{bits}", "shl"), (f"b{bits}", "shr"), (f"u{bits}", "shr"), (f"s{bits}", "shr")):
        check(
            f"{opcode}.{kind} %d, %a, %b;",
            kind,
            [kind, "u32"],
            lambda a, by, left=opcode == "shl": a << min(by, 64) if left else a >> min(by, 64),
            fields(kind, lengths=1),
        )


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shifts(mode):
    def amount(by: int) -> int:
        return min(by, 32) if mode == "clamp" else by & 31

    kinds = ["b32", "b32", "u32"]
    rows = fields("b32", "b32", lengths=1)
    check(
        f"shf.l.{mode}.b32 %d, %a, %b, %c;",
        "b32",
        kinds,
        lambda a, b, c: ((b << 32 | a) << amount(c)) >> 32,
        rows,
    )
    check(f"shf.r.{mode}.b32 %d, %a, %b, %c;", "b32", kinds, lambda a, b, c: (b << 32 | a) >> amount(c), rows)


# The bytes that each mode selects, the highest first, by the last two bits of c (PTX ISA, "prmt").
PERMUTATIONS = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


@pytest.mark.parametrize("mode", PERMUTATIONS)
def test_permutation_modes(mode):
    def permute(a: int, b: int, c: int) -> int:
        return sum(
            ((b << 32 | a) >> 8 * int(source) & 0xFF) << 8 * i
            for i, source in enumerate(reversed(PERMUTATIONS[mode][c & 3]))
        )

    check(f"prmt.b32.{mode} %d, %a, %b, %c;", "b32", ["b32"] * 3, permute, grid("b32", "b32", "b32"))


def test_permutations():
    def permute(a: int, b: int, c: int) -> int:
        result = 0
        for i in range(4):
            selection = c >> 4 * i & 15
            byte = (b << 32 | a) >> 8 * (selection & 7) & 0xFF
            result |= (byte if selection < 8 else 0xFF * (byte >> 7)) << 8 * i
        return result

    selections = [*edges("b32"), 0x3210, 0x7654, 0xFEDC, 0x8888, 0x5410, 0x7632]
    rows = list(itertools.product(edges("b32"), edges("b32"), selections))[::5]
    check("prmt.b32 %d, %a, %b, %c;", "b32", ["b32"] * 3, permute, rows)


@pytest.mark.parametrize("opcode", ["and", "or", "xor"])
def test_predicate_logic(opcode):
    function = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}[opcode]
    text = f"setp.ne.u32 %q, %a, 0; setp.ne.u32 %r, %b, 0; {opcode}.pred %p, %q, %r; selp.u32 %d, 1, 0, %p;"
    rows = list(itertools.product([0, 1], [0, 1])) * 9
    check(text, "u32", ["u32", "u32"], function, rows)


def test_predicate_moves():
    rows = [(i,) for i in (0, 1, 0, 0, 1, 1) * 7]
    negate = "setp.ne.u32 %q, %a, 0; not.pred %p, %q; selp.u32 %d, 1, 0, %p;"
    check(negate, "u32", ["u32"], lambda a: 1 - a, rows)
    check("setp.ne.u32 %q, %a, 0; mov.pred %p, %q; selp.u32 %d, 1, 0, %p;", "u32", ["u32"], lambda a: a, rows)
    check("mov.pred %p, 1; selp.u32 %d, %a, 5, %p;", "u32", ["u32"], lambda a: a, rows)
    check("mov.pred %p, 0; selp.u32 %d, %a, 5, %p;", "u32", ["u32"], lambda a: 5, rows)
