"""Integers of PTX's types: their values at the edges, and instructions checked against Python's integers.

A type is named as in PTX: "u16", "s32", "b64". Values of unsigned types and bit strings are not negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from hypothesis import strategies as st

from tests.emulator.single import Array, apply

Row = tuple[int, ...]


def width(kind: str) -> int:
    """The type's bits."""
    return int(kind[1:])


def wrap(value: int, kind: str) -> int:
    """The value that the type's bits hold."""
    value &= (1 << width(kind)) - 1
    return value - (1 << width(kind)) if kind[0] == "s" and value >> width(kind) - 1 else value


def clamp(value: int, kind: str) -> int:
    """The type's value nearest to the value."""
    low = -(1 << width(kind) - 1) if kind[0] == "s" else 0
    return max(low, min(value, low + (1 << width(kind)) - 1))


def dtype(kind: str) -> np.dtype[np.generic]:
    """numpy's type of the same values."""
    return np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{width(kind)}")


def edges(kind: str) -> list[int]:
    """Values around zero, the powers of two in the middle and at the top, and two patterns."""
    bits = width(kind)
    near = [0, 1, 2, 3, 7, 1 << bits // 2, 1 << bits - 1, 1 << bits - 2]
    values = {value + change for value in near for change in (-1, 0, 1)}
    values |= {-value for value in values} | {0x5555555555555555, 0x123456789ABCDEF0}
    return sorted({wrap(value, kind) for value in values})


def grid(*kinds: str) -> list[Row]:
    """Every combination of edge values; of three or more operands every seventh."""
    rows = list(itertools.product(*(edges(kind) for kind in kinds)))
    return rows if len(kinds) < 3 else rows[::7]


def any_value(kind: str) -> st.SearchStrategy[int]:
    """Any value of the type."""
    return st.integers(0, (1 << width(kind)) - 1).map(lambda value: wrap(value, kind))


def columns(rows: Iterable[Row], kinds: Sequence[str]) -> list[Array]:
    """The rows' values as one array for each operand."""
    return [
        np.array(column, dtype(kind)) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)
    ]


def check(
    instruction: str,
    result: str,
    kinds: Sequence[str],
    expected: Callable[..., int],
    rows: Sequence[Row] | None = None,
) -> None:
    """Asserts that the instruction gives the expected integers, wrapped to the result's type.

    Args:
        instruction: In the words of `single.apply`.
        result: The type of `%d`.
        kinds: The types of the sources.
        expected: The result of the sources' values.
        rows: The sources' values; the edges' grid where it is not given.
    """
    rows = grid(*kinds) if rows is None else rows
    got = apply(instruction, dtype(result), *columns(rows, kinds)).tolist()
    right = [wrap(expected(*row), result) for row in rows]
    wrong = [case for case in zip(rows, got, right, strict=True) if case[1] != case[2]]
    assert not wrong, f"{instruction}: {len(wrong)} wrong, first (sources, got, expected): {wrong[0]}"
