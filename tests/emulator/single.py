"""Runs a single instruction on arrays: a kernel loads one element of each source per thread, applies the
instruction, and stores the result.

In an instruction's text `%d` is the destination, `%a`, `%b`, `%c` and `%e` are the sources and `%p` and `%q`
are predicates; several instructions may follow one another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.emulator import Machine, Module, Output

Array = npt.NDArray[Any]

_SOURCES = "abce"
_THREADS = 256
_HEADER = ".version 8.8\n.target sm_100\n.address_size 64\n"


def _register(bytes_each: int) -> str:
    # PTX has no arithmetic on 8-bit registers: cvt reads the low byte of a wider one.
    return f"b{8 * max(bytes_each, 2)}"


def _kernel(instruction: str, result: int, sources: Sequence[int]) -> str:
    names = _SOURCES[: len(sources)]
    lines = [
        _HEADER,
        f".visible .entry apply(.param .u64 to, {''.join(f'.param .u64 from_{n}, ' for n in names)}",
    ]
    lines.append(".param .u32 count)\n{\n.reg .pred %p, %q, %r, %past;\n.reg .b32 %i, %n, %block, %threads;")
    lines.append(".reg .b64 %at, %base, %offset;")
    lines.append(f".reg .{_register(result)} %d;")
    lines += [f".reg .{_register(size)} %{n};" for n, size in zip(names, sources, strict=True)]
    lines.append("mov.u32 %block, %ctaid.x;\nmov.u32 %threads, %ntid.x;\nmov.u32 %i, %tid.x;")
    lines.append("mad.lo.s32 %i, %block, %threads, %i;\nld.param.u32 %n, [count];")
    lines.append("setp.ge.u32 %past, %i, %n;\n@%past bra END;")
    for n, size in zip(names, sources, strict=True):
        lines.append(f"ld.param.u64 %base, [from_{n}];\nmul.wide.u32 %offset, %i, {size};")
        lines.append(f"add.s64 %at, %base, %offset;\nld.global.u{8 * size} %{n}, [%at];")
    lines.append(instruction)
    lines.append(f"ld.param.u64 %base, [to];\nmul.wide.u32 %offset, %i, {result};")
    lines.append(f"add.s64 %at, %base, %offset;\nst.global.u{8 * result} [%at], %d;\nEND:\nret;\n}}\n")
    return "\n".join(lines)


@functools.cache
def _load(ptx: str) -> Module:
    return Machine().load(ptx)


def apply(instruction: str, result: npt.DTypeLike, *sources: Array) -> Array:
    """The instruction's results, one for each element of the sources, which are of the same length.

    Raises:
        AssertionError: the run had findings.
    """
    to = np.zeros(len(sources[0]), result)
    ptx = _kernel(instruction, to.itemsize, [source.itemsize for source in sources])
    blocks = -(-len(to) // _THREADS)
    arguments = [np.ascontiguousarray(source) for source in sources]
    launch = _load(ptx).launch("apply", blocks, _THREADS, Output(to), *arguments, np.uint32(len(to)))
    launch.assert_clean()
    return to


def undefined_bits(instruction: str, width: int, *sources: tuple[int, int, int]) -> int:
    """Which bits of the `width`-bit result are undefined, for sources of (width, value, undefined bits).

    A register that was never written is undefined throughout; masking it, which is exact bit by bit, makes
    the sources. Each bit of the result then decides a branch of its own, where an undefined one is reported.
    """
    lines = [_HEADER, ".visible .entry apply()\n{\n.reg .pred %p, %q, %r, %bit;"]
    lines.append(f".reg .b{width} %d, %one;")
    for n, (bits, value, undefined) in zip(_SOURCES, sources, strict=False):
        keep = (1 << bits) - 1 & ~undefined
        lines.append(f".reg .b{bits} %{n}, %never_{n};\nand.b{bits} %{n}, %never_{n}, {undefined:#x};")
        lines.append(f"or.b{bits} %{n}, %{n}, {value & keep:#x};")
    lines.append(instruction)
    text = "\n".join(lines)
    first = text.count("\n") + 2
    for bit in range(width):
        text += f"\nand.b{width} %one, %d, {1 << bit:#x};"
        text += (
            f"\nsetp.ne.{'b' if width > 8 else 'u'}{width} %bit, %one, 0;\n@%bit bra BIT_{bit};\nBIT_{bit}:"
        )
    launch = _load(text + "\nret;\n}\n").launch("apply", 1, 1)
    bits_found = 0
    for finding in launch.findings:
        offset = finding.ptx_line - first
        if offset % 4 != 2 or not 0 <= offset // 4 < width:
            raise RuntimeError(f"{instruction}: {finding}")
        bits_found |= 1 << offset // 4
    return bits_found
