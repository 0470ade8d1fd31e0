"""What the kernels move: launches and bytes, counted by the emulator as the real launchers run.

Unique bytes count each byte of a buffer once, in each launch: what DRAM must carry where nothing stays in a
cache. Total bytes count every access: what passes between the multiprocessors and the L2. PEFT's bytes are
counted from its sequence of ops (benchmarks/sequences.py), for it has no kernels of its own to emulate.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.sequences import (
    ADAPTER,
    FROZEN,
    FUSED,
    PEFT_SEQUENCES,
    Sequence,
    coefficients,
    without_frozen,
)
from benchmarks.shapes import Shape
from benchmarks.tables import markdown
from tests.emulator import Machine, native
from tests.emulator.machine import Launch, Traffic
from tests.emulator.oracles.cutlass import GEMMS, compile_gemms
from tests.emulator.oracles.run import Operands as GemmOperands
from tests.emulator.oracles.run import run_gemm
from tests.kernels.call import Mode, load, run_backward, run_forward
from tests.kernels.cases import KINDS
from tests.kernels.group import group_of, run_backward_group, run_forward_group
from tests.operands import BF16, Operands, operands

# Buffers of the sizes of x, of y and of W; whatever else there is has terms in the rank alone.
U, V, W = ("x", "dx"), ("y", "dy"), ("weight",)
BY_NAME = {kind.name: kind for kind in KINDS}
CUTLASS_TILE = (128, 128)  # of cutlass_sm80_bf16_tn, and of lora_gemm's large tile


@dataclass(frozen=True)
class Moved:
    """One launch: unique bytes for each element of x (or dx), y (or dy) and W, and total bytes."""

    half: str
    kernel: str
    blocks: int
    u: float
    v: float
    w: float
    rank_bytes: int  # unique, of everything else
    long_total: int  # of x, dx, y, dy and W
    rank_total: int


def measure(shape: Shape, *, dropout: float, device: str = "a100", frozen: bool = True) -> list[Moved]:
    """Every launch of a bf16 call, forward and backward. The emulator's checks must find nothing.

    frozen: whether the frozen product is part of it; else the call adds, in place, to what a layer gave.
    """
    given = _operands(shape, dropout)
    machine = Machine(device, check_races=False)  # a shape of this size takes seconds as it is
    kernels = load()
    dy = torch.randn(shape.rows, shape.out_features).to(BF16)
    base = None if frozen else dy.clone()
    forward = run_forward(kernels, machine, given, Mode(), base=base, in_place=not frozen)
    backward = run_backward(kernels, machine, dy, forward.h, given, Mode(), frozen=frozen)
    launches = []
    for half, run in (("forward", forward.run), ("backward", backward.run)):
        run.result.assert_clean()
        launches += [_moved(half, launch, shape) for launch in run.result.launches]
    return launches


def measure_group(shape: Shape, *, dropout: float, device: str = "a100") -> tuple[list[Moved], list[Moved]]:
    """Every launch of three projections of one x, each as wide as x: in a group, and by themselves."""
    m, k = shape.rows, shape.in_features
    square = Shape("", m, k, k, shape.rank)
    group = group_of(BY_NAME["bf16"], m, k, 3 * ((k, shape.rank),), dropout)
    machine = Machine(device, check_races=False)
    kernels = load()
    grouped, apart = [], []
    forward = run_forward_group(kernels, machine, group, Mode())
    backward = run_backward_group(kernels, machine, group, forward.hs, Mode())
    for half, run in (("forward", forward.run), ("backward", backward.run)):
        grouped += [_moved(half, launch, square) for launch in run.result.assert_clean().launches]
    for member, dy, h in zip(group.members, group.dys, forward.hs, strict=True):
        own = run_forward(kernels, machine, member, Mode()).run
        of_it = run_backward(kernels, machine, dy, h.contiguous(), member, Mode()).run
        for half, run in (("forward", own), ("backward", of_it)):
            apart += [_moved(half, launch, square) for launch in run.result.assert_clean().launches]
    return grouped, apart


# Of the dx of three projections: two are read and one is written, twice.
DX_ADDITIONS = 2 * (Moved("backward", "add", 0, 6, 0, 0, 0, 0, 0),)


def cutlass(shape: Shape, device: str = "a100") -> int:
    """Total bytes that CUTLASS's plain GEMM x Wᵀ moves, with the tile of our large one."""
    (gemm,) = (g for g in GEMMS if g.launcher == "cutlass_sm80_bf16_tn")
    launchers = ctypes.CDLL(str(compile_gemms(gemm.arch, native.build_library())))
    machine = Machine(device, check_races=False)
    sizes = GemmOperands(gemm, shape.rows, shape.out_features, shape.in_features)
    _, result = run_gemm(machine, launchers, gemm, sizes)
    result.assert_clean()
    return sum(b.bytes_read + b.bytes_written for b in result.only.buffers.values())


def report(shape: Shape, *, dropout: float = 0.1, device: str = "a100") -> str:
    """The launches, then their sums beside PEFT's sequences, then the GEMM beside CUTLASS's."""
    launches = measure(shape, dropout=dropout, device=device)
    alone = measure(shape, dropout=dropout, device=device, frozen=False)
    m, n = shape.rows, shape.out_features
    peft = tuple(without_frozen(sequence) for sequence in PEFT_SEQUENCES)
    grouped, apart = measure_group(shape, dropout=dropout, device=device)
    square = Shape("", m, shape.in_features, shape.in_features, shape.rank)
    lines = [
        "# Counted traffic",
        (__doc__ or "").partition("\n\n")[2].strip(),
        f"\n{shape}, r={shape.rank}, bf16, dropout {dropout:g}, emulated {device}\n",
        _table(launches),
        "\nu is a byte for each element of x, v of y, w of W. Unique bytes, forward and backward together; "
        "all but the first row leave out the terms in r:\n",
        _sums(launches, shape, FUSED, (FROZEN, *PEFT_SEQUENCES)),
        "\nThe adapter alone, on top of a frozen product that another computes:\n",
        _table(alone),
        "",
        _sums(alone, shape, ADAPTER, peft),
        f"\nA group, q, k and v of {square} each, forward and backward together; by themselves each writes "
        "a dx of its own, which torch adds up:\n",
        markdown(
            SUMS,
            [
                _sum("in a group, counted", grouped, square),
                _sum("by themselves, counted", apart, square),
                _sum("and torch's additions, planned", [*apart, *DX_ADDITIONS], square),
            ],
        ),
    ]
    gemm = next((it for it in launches if it.half == "forward" and it.w), None)
    if gemm is not None and gemm.blocks == -(-m // CUTLASS_TILE[0]) * -(-n // CUTLASS_TILE[1]):
        theirs = cutlass(shape, device)
        lines.append(
            f"\nForward GEMM of 128×128 tiles, total bytes: CUTLASS's x Wᵀ {theirs:,}; ours "
            f"{gemm.long_total:,} of x, W and y ({gemm.long_total - theirs:+,}) and {gemm.rank_total:,} "
            "of the low-rank operands"
        )
    return "\n".join(lines)


def _table(launches: list[Moved]) -> str:
    return markdown(
        ("launch", "half", "blocks", "u", "v", "w", "rank, KiB", "total long, MiB", "total rank, KiB"),
        [
            [
                launch.kernel,
                launch.half,
                str(launch.blocks),
                *(f"{value:.3g}" for value in (launch.u, launch.v, launch.w)),
                f"{launch.rank_bytes / 1024:.1f}",
                f"{launch.long_total / 2**20:.2f}",
                f"{launch.rank_total / 1024:.1f}",
            ]
            for launch in launches
        ],
    )


def _operands(shape: Shape, dropout: float) -> Operands:
    lead = (shape.rows,)
    sizes = (shape.in_features, shape.out_features, shape.rank)
    return operands(lead, *sizes, BF16, bias=False, dropout_p=dropout)


def _moved(half: str, launch: Launch, shape: Shape) -> Moved:
    m, k, n = shape.rows, shape.in_features, shape.out_features

    def of(names: Collection[str]) -> list[Traffic]:
        return [traffic for name, traffic in launch.buffers.items() if kind_of(name) in names]

    def unique(names: Collection[str]) -> int:
        return sum(b.unique_read + b.unique_written for b in of(names))

    def total(names: Collection[str]) -> int:
        return sum(b.bytes_read + b.bytes_written for b in of(names))

    long = {*U, *V, *W}
    rest = {kind_of(name) for name in launch.buffers} - long
    return Moved(
        half,
        short_name(launch.kernel),
        launch.grid[0] * launch.grid[1] * launch.grid[2],
        unique(U) / (m * k),
        unique(V) / (m * n),
        unique(W) / (k * n),
        unique(rest),
        total(long),
        total(rest),
    )


def kind_of(buffer: str) -> str:
    """A buffer's name without its projection's number."""
    return buffer.rstrip("0123456789")


SUMS = ("", "launches", "u", "v", "w", "MiB")


def _sum(name: str, launches: list[Moved], shape: Shape) -> list[str]:
    u, v, w = (sum(getattr(it, unit) for it in launches) for unit in ("u", "v", "w"))
    return _row(name, len(launches), shape, u, v, w, sum(it.rank_bytes for it in launches))


def _row(
    name: str, count: int, shape: Shape, u: float, v: float, w: float, rank_bytes: float = 0
) -> list[str]:
    m, k, n = shape.rows, shape.in_features, shape.out_features
    mib = (u * m * k + v * m * n + w * k * n + rank_bytes) / 2**20
    return [name, str(count), *(f"{value:.3g}" for value in (u, v, w)), f"{mib:.2f}"]


def _sums(launches: list[Moved], shape: Shape, ours: Sequence, others: tuple[Sequence, ...]) -> str:
    rows = [_sum("fused, counted", launches, shape)]
    for name, sequence in (("fused, planned", ours), *((other.name, other) for other in others)):
        kernels = sequence.forward + sequence.backward
        rows.append(_row(name, len(kernels), shape, *coefficients(kernels)))
    return markdown(SUMS, rows)


@cache
def short_name(mangled: str) -> str:
    """A kernel's name without its namespaces' common part and its template arguments."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    name = mangled
    if tool is not None:
        name = subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void |\(anonymous namespace\)::", "", name)
    return name.removeprefix("fused_lora::kernels::").partition("(")[0].partition("<")[0]
