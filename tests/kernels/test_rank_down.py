"""The tensor-core rank-down: every tile, layout and element type against float64, what it packs for
lora_gemm, what it moves, and what the compiler made of it."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_lora import reference
from tests.emulator import Machine, Output
from tests.emulator.cuda_runtime import CudaError, runtime
from tests.emulator.devices import DEVICES
from tests.emulator.machine import Result
from tests.emulator.static_report import _binary_tool
from tests.kernels import bridge
from tests.kernels.structures import (
    DTYPE_OF,
    Arithmetic,
    Device,
    Dropout,
    MatrixView,
    PackFactor,
    RankDown,
)
from tests.operands import BF16, F16, F32

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FOLDER = CSRC / "kernels" / "rank_down"
ORDERS = ("forward", "reverse", "random")
TILES = [(64, 64), (64, 32), (32, 32), (32, 16), (16, 16)]
DEPTH_CHUNKS, RANK_CHUNKS, ELEMENTS = range(3)
SEED = 0x1234_5678_9ABC_DEF0
ALPHA = 1.25
ACCUMULATION = 2.0**-20  # what fp32 sums may lose of the sum of the magnitudes
PIECES = 2.0**-22  # what two tf32 pieces leave of an fp32 number, beside its own magnitude


@dataclass(frozen=True)
class Kind:
    """dtype of x, dtype of the adapters, and what their products are made of."""

    dtype: torch.dtype
    adapters: torch.dtype
    arithmetic: Arithmetic

    @property
    def rank_dtype(self) -> torch.dtype:
        return self.dtype if self.arithmetic == Arithmetic.HALF else F32

    @property
    def packed_dtype(self) -> torch.dtype:
        return BF16 if self.arithmetic == Arithmetic.HALF_MASTERS else self.dtype

    def seen(self, operand: torch.Tensor) -> torch.Tensor:
        """An operand as the products see it, in float64."""
        if self.arithmetic == Arithmetic.TF32:
            bits = operand.contiguous().view(torch.int32)
            return ((bits + 0x1000) & ~0x1FFF).view(F32).double()  # to nearest, ties away from zero
        return (operand.to(self.dtype) if self.arithmetic == Arithmetic.HALF else operand).double()

    def packed(self, operand: torch.Tensor, *, left: bool) -> torch.Tensor:
        """What stages.h says of a packed operand, rows×depth, before the padding."""
        high = operand.to(self.packed_dtype)
        if self.arithmetic != Arithmetic.HALF_MASTERS:
            return high
        low = (operand - high.float()).to(BF16)
        return torch.cat([high, high, low] if left else [high, low, high], dim=1)


KINDS = [
    *(
        Kind(half, adapters, arithmetic)
        for half in (BF16, F16)
        for adapters, arithmetic in (
            (half, Arithmetic.HALF),
            (F32, Arithmetic.HALF),
            (F32, Arithmetic.HALF_MASTERS),
        )
    ),
    Kind(F32, F32, Arithmetic.TF32),
]
HALF, ROUNDED, MASTERS, *_, TF32 = KINDS
BY_KIND = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda k: f"{k.dtype}-{k.adapters}-{k.arithmetic.name}".replace("torch.", "")
)


@pytest.fixture(scope="module")
def launchers() -> ctypes.CDLL:
    sources = [*sorted(FOLDER.glob("*_sm80.cu")), FOLDER / "rank_down.cpp"]
    library = bridge.load("rank_down_launcher.cpp", sources, (RankDown, Device))
    library.obstacle.restype = ctypes.c_char_p
    library.packed_rank.restype = ctypes.c_int64
    library.packed_rank.argtypes = [ctypes.c_int, ctypes.c_int64]
    return library


def draw(rows: int, columns: int, dtype: torch.dtype, key: int, layout: str = "rows") -> torch.Tensor:
    """rows: dense. columns: dense the other way round. padded-…: with gaps of NaN at multiples of 16 bytes.
    shifted-…: dense rows or columns that begin at an odd element. sparse: every third. expanded: one row."""
    side, _, along = layout.rpartition("-")
    if along == "columns":
        return draw(columns, rows, dtype, key, f"{side}-rows".lstrip("-")).t()
    if layout == "expanded":
        return draw(1, columns, dtype, key).expand(rows, columns)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(key), dtype=F32).to(dtype)
    if layout == "rows":
        return values
    if layout == "sparse":
        view = torch.full((2 * rows, 3 * columns + 1), float("nan"), dtype=dtype)[::2, 1::3]
    elif side == "padded":
        view = torch.full((rows, columns + 24), float("nan"), dtype=dtype)[:, 8 : 8 + columns]
    else:
        view = torch.full((rows * columns + 1,), float("nan"), dtype=dtype)[1:].view(rows, columns)
    return view.copy_(values)


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """x in float64 with zeros where the mask drops; the scale is the caller's."""
    rows, columns = x.shape
    mask = reference.dropout_mask(torch.tensor([SEED]), rows, columns, p)
    return torch.where(mask, x.double(), 0.0)


@dataclass
class Partner:
    """The other adapter matrix, extent×rank. stride: of packed's rows where it is packed_rank×extent."""

    factor: torch.Tensor
    stride: int | None = None


@dataclass
class Run:
    result: Result
    out: torch.Tensor | None = None
    packed: torch.Tensor | None = None
    partner: torch.Tensor | None = None
    stage: RankDown = field(default_factory=RankDown)


def describe(kind: Kind, x: Any, factor: Any, p: float, seed: int) -> RankDown:
    """The stage without its outputs; x and factor are placed buffers."""
    return RankDown(
        arithmetic=kind.arithmetic,
        dtype=DTYPE_OF[kind.dtype],
        factor_dtype=DTYPE_OF[kind.adapters],
        rows=x.array.shape[0],
        columns=x.array.shape[1],
        rank=factor.array.shape[1],
        x=MatrixView.of(x),
        factor=MatrixView.of(factor),
        alpha=ALPHA,
        dropout=Dropout.of(p, seed) if p else Dropout.none(),
    )


def rank_down(
    launchers: ctypes.CDLL,
    kind: Kind,
    x: torch.Tensor,
    factor: torch.Tensor,
    *,
    p: float = 0.0,
    partner: Partner | None = None,
    outputs: tuple[str, ...] = ("out", "packed"),
    tile: tuple[int, int] | None = None,
    machine: Machine | None = None,
) -> Run:
    """tile: of those in TILES; by default the launcher's choice for an A100."""
    rows, rank = x.shape[0], factor.shape[1]
    machine = machine or Machine()
    depth = launchers.packed_rank(kind.arithmetic, rank)
    run = Run(Result([]))
    arrays: dict[str, Any] = {"x": x, "factor": factor, "seed": torch.tensor([SEED])}
    if "out" in outputs:
        run.out = torch.empty(rows, rank, dtype=kind.rank_dtype)
        arrays["out"] = Output(run.out)
    if "packed" in outputs:
        run.packed = torch.empty(rows, depth, dtype=kind.packed_dtype)
        arrays["packed"] = Output(run.packed)
    if partner is not None:
        depth = launchers.packed_rank(kind.arithmetic, partner.factor.shape[1])
        extent = partner.factor.shape[0]
        if partner.stride is None:
            run.partner = torch.empty(extent, depth, dtype=kind.packed_dtype)
        else:
            run.partner = torch.empty(depth, partner.stride, dtype=kind.packed_dtype)[:, :extent]
        arrays |= {"other": partner.factor, "partner": Output(run.partner)}
    with machine.buffers(**arrays) as placed:
        stage = describe(kind, placed["x"], placed["factor"], p, placed["seed"].pointer)
        stage.out = placed["out"].pointer if "out" in outputs else None
        stage.packed = placed["packed"].pointer if "packed" in outputs else None
        if partner is not None:
            stage.partner = PackFactor(
                factor=MatrixView.of(placed["other"]),
                factor_dtype=DTYPE_OF[kind.adapters],
                extent=partner.factor.shape[0],
                rank=partner.factor.shape[1],
                depth_contiguous=partner.stride is None,
                stride=partner.stride or depth,
                packed=placed["partner"].pointer,
            )
        run.stage = stage
        if tile is None:
            device = Device(80, 108, 163 * 1024)
            run.result = machine.run(
                lambda: launchers.rank_down(ctypes.byref(stage), 1, ctypes.byref(device))
            )
        else:
            run.result = machine.run(lambda: launchers.rank_down_by_tile(ctypes.byref(stage), 1, *tile))
    assert run.result.value == CudaError.SUCCESS
    run.result.assert_clean()
    return run


def check_packed(packed: torch.Tensor, exact: torch.Tensor) -> None:
    """exact, and zeros as far as packed goes."""
    assert torch.equal(packed[:, : exact.shape[1]], exact)
    assert (packed[:, exact.shape[1] :] == 0).all()


def check(
    launchers: ctypes.CDLL,
    kind: Kind,
    rows: int,
    columns: int,
    rank: int,
    *,
    x: str = "rows",
    factor: str = "columns",
    p: float = 0.0,
    **options: Any,
) -> Run:
    x_ = draw(rows, columns, kind.dtype, key=1, layout=x)
    factor_ = draw(columns, rank, kind.adapters, key=2, layout=factor)
    run = rank_down(launchers, kind, x_, factor_, p=p, **options)
    left, right = drop(kind.seen(x_), p), kind.seen(factor_)
    exact, magnitude = ALPHA * left @ right, ALPHA * left.abs() @ right.abs()
    assert run.out is not None
    rounding = torch.finfo(run.out.dtype).eps / 2
    bound = rounding * exact.abs() + (2 * ACCUMULATION + PIECES) * magnitude
    assert ((run.out.double() - exact).abs() <= bound).all()
    if run.packed is not None:
        check_packed(run.packed, kind.packed(run.out, left=True))
    return run


@BY_KIND
@pytest.mark.parametrize("order", ORDERS)
def test_every_kind_is_right_and_clean(kind, order, launchers):
    machine = Machine(order=order, seed=1)
    check(launchers, kind, 129, 200, 40, x="padded-rows", p=0.25, machine=machine)
    check(launchers, kind, 17, 576, 16, factor="rows", machine=machine)


@pytest.mark.parametrize("factor", ["columns", "rows"])
@pytest.mark.parametrize("kind", [HALF, ROUNDED, MASTERS, TF32], ids=["half", "rounded", "masters", "tf32"])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
def test_every_tile_is_right_with_every_layout_of_the_factor(kind, factor, tile, launchers):
    rows, ranks = tile
    run = check(launchers, kind, rows + 9, 264, ranks + 8, factor=factor, p=0.5, tile=tile)
    assert launchers.factor_source(ctypes.byref(run.stage)) == (
        DEPTH_CHUNKS if factor == "columns" else RANK_CHUNKS
    )


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 40, 64, 128, 256])
@pytest.mark.parametrize("factor", ["columns", "rows"])
def test_ranks(rank, factor, launchers):
    for kind in (HALF, MASTERS) if rank in (3, 40) else (KINDS[rank.bit_length() % len(KINDS)],):
        check(launchers, kind, 7, 72, rank, factor=factor)


@pytest.mark.parametrize(
    ("rows", "columns", "kind"),
    [
        (1, 64, HALF),
        (1, 1536, TF32),
        (7, 576, MASTERS),
        (7, 200, TF32),
        (16, 1536, HALF),
        (16, 200, ROUNDED),
        (129, 64, MASTERS),
        (129, 8, HALF),
        (40, 4, TF32),
        (2, 24, MASTERS),
    ],
)
def test_rows_and_columns(rows, columns, kind, launchers):
    check(launchers, kind, rows, columns, 8)


@pytest.mark.parametrize(
    ("layout", "source"),
    [
        ("padded-columns", DEPTH_CHUNKS),
        ("padded-rows", RANK_CHUNKS),
        ("shifted-columns", ELEMENTS),
        ("shifted-rows", ELEMENTS),
        ("sparse", ELEMENTS),
        ("expanded", ELEMENTS),
    ],
)
@pytest.mark.parametrize("kind", [HALF, ROUNDED, MASTERS, TF32], ids=["half", "rounded", "masters", "tf32"])
def test_the_factor_may_lie_anywhere(kind, layout, source, launchers):
    # One row for all is one of the chunked layouts where the rank makes whole chunks.
    rank = 17 if layout == "expanded" else 24
    run = check(launchers, kind, 18, 200, rank, factor=layout)
    assert launchers.factor_source(ctypes.byref(run.stage)) == source


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", [HALF, MASTERS, TF32], ids=["half", "masters", "tf32"])
def test_small_ranks_of_any_size_with_the_rank_contiguous(kind, rank, launchers):
    check(launchers, kind, 5, 40, rank, factor="rows")


def test_rows_of_x_may_be_one_and_the_same(launchers):
    check(launchers, HALF, 20, 72, 8, x="expanded")


@pytest.mark.parametrize("kind", [HALF, TF32], ids=["half", "tf32"])
def test_dropped_elements_are_zeros_whatever_they_held(kind, launchers):
    x = draw(33, 136, kind.dtype, key=1)
    mask = reference.dropout_mask(torch.tensor([SEED]), 33, 136, 0.4)
    factor = draw(136, 8, kind.adapters, key=2, layout="columns")
    clean = rank_down(launchers, kind, x * mask, factor)
    dropped = rank_down(launchers, kind, x.masked_fill(~mask, float("nan")), factor, p=0.4)
    assert torch.equal(clean.out, dropped.out)
    nothing = rank_down(launchers, kind, x, factor, p=1.0)
    assert (nothing.out == 0).all()
    assert (nothing.packed == 0).all()


@pytest.mark.parametrize("kind", [HALF, ROUNDED, MASTERS, TF32], ids=["half", "rounded", "masters", "tf32"])
@pytest.mark.parametrize("rank", [3, 16, 72])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("stride", [None, 144])
def test_the_partner_is_packed_beside(kind, rank, layout, stride, launchers):
    other = draw(131, rank, kind.adapters, key=3, layout=layout)
    run = check(launchers, kind, 18, 72, rank, partner=Partner(other, stride))
    assert run.partner is not None
    check_packed(run.partner if stride is None else run.partner.t(), kind.packed(other, left=False))
    assert len(run.result.launches) == 1


@BY_KIND
def test_any_output_may_be_missing(kind, launchers):
    x, factor = draw(18, 72, kind.dtype, key=1), draw(72, 20, kind.adapters, key=2)
    partner = Partner(draw(40, 20, kind.adapters, key=3))
    both = rank_down(launchers, kind, x, factor, partner=partner)
    out = rank_down(launchers, kind, x, factor, outputs=("out",))
    assert torch.equal(out.out, both.out)
    packed = rank_down(launchers, kind, x, factor, outputs=("packed",), partner=partner)
    assert torch.equal(packed.packed, both.packed)
    alone = rank_down(launchers, kind, x, factor, outputs=(), partner=partner)
    assert torch.equal(alone.partner, both.partner)
    assert "x" not in alone.result.only.buffers
    assert rank_down(launchers, kind, x, factor, outputs=()).result.launches == []


def test_no_rows_launch_nothing_and_no_columns_give_zeros(launchers):
    none = rank_down(launchers, HALF, torch.empty(0, 64, dtype=BF16), draw(64, 8, BF16, key=2))
    assert none.result.launches == []
    zeros = rank_down(launchers, HALF, torch.empty(5, 0, dtype=BF16), torch.empty(0, 8, dtype=BF16))
    assert (zeros.out == 0).all()
    assert (zeros.packed == 0).all()


@pytest.mark.parametrize("kind", [HALF, MASTERS], ids=["half", "masters"])
def test_the_same_bits_in_any_order_of_the_blocks(kind, launchers):
    def outputs(machine):
        partner = Partner(draw(70, 40, kind.adapters, key=3))
        run = check(launchers, kind, 100, 200, 40, p=0.1, partner=partner, machine=machine)
        return run.out, run.packed, run.partner

    first = outputs(Machine())
    for order in ORDERS:
        for one, other in zip(first, outputs(Machine(order=order, seed=7)), strict=True):
            assert torch.equal(one, other)


@BY_KIND
@pytest.mark.parametrize("factor", ["columns", "rows"])
@pytest.mark.parametrize("tile", [(64, 64), (32, 32), (16, 16)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_aligned_shapes_waste_no_sector_and_have_no_bank_conflict(kind, factor, tile, launchers):
    rows, ranks = tile
    other = draw(128, ranks, kind.adapters, key=3)
    run = check(launchers, kind, 2 * rows, 256, ranks, factor=factor, tile=tile, partner=Partner(other))
    launch = run.result.only
    assert launch.total("sectors") == launch.total("ideal_sectors") > 0
    assert launch.total("wavefronts") == launch.total("ideal_wavefronts") > 0
    x, f, out, packed = (launch.buffers[name] for name in ("x", "factor", "out", "packed"))
    assert x.bytes_read == x.unique_read == 2 * rows * 256 * kind.dtype.itemsize
    assert f.bytes_read == 2 * f.unique_read == 2 * 256 * ranks * kind.adapters.itemsize
    assert out.bytes_written == out.unique_written == 2 * rows * ranks * kind.rank_dtype.itemsize
    assert packed.bytes_written == packed.unique_written == run.packed.numel() * kind.packed_dtype.itemsize
    assert launch.buffers["partner"].bytes_written == run.partner.numel() * kind.packed_dtype.itemsize
    pieces = 2 if kind.arithmetic == Arithmetic.HALF_MASTERS else 1
    depth = 16 if kind.arithmetic == Arithmetic.HALF else 8
    mma = sum(n for opcode, n in launch.instructions.items() if opcode.startswith("mma."))
    assert mma == pieces * (2 * rows * 256 * ranks) // (16 * 8 * depth)


def test_a_row_beyond_the_last_and_a_chunk_beyond_a_row_are_not_read(launchers):
    launch = check(launchers, HALF, 19, 200, 20, factor="columns").result.only
    x = launch.buffers["x"]
    rank_tiles = 2
    assert x.bytes_read == rank_tiles * x.unique_read == rank_tiles * 19 * 200 * 2


@contextmanager
def rows_far_apart(machine: Machine, x: torch.Tensor, stride: int) -> Iterator[int]:
    """The device address of x's rows, `stride` elements apart; the memory between is never committed."""
    address = machine.allocate(((x.shape[0] - 1) * stride + x.shape[1]) * x.element_size(), "x")
    for i, row in enumerate(x):
        size = row.numel() * row.element_size()
        target = address + i * stride * x.element_size()
        assert runtime().cudaMemcpy(target, row.data_ptr(), size, 1) == CudaError.SUCCESS
    try:
        yield address
    finally:
        machine.free(address)


def test_rows_may_lie_beyond_two_to_the_31st_elements(launchers):
    x, factor = draw(20, 64, BF16, key=1), draw(64, 8, BF16, key=2)
    near = rank_down(launchers, HALF, x, factor)
    machine, far = Machine(), torch.empty(20, 8, dtype=BF16)
    stride = (1 << 31) // 16 + 8
    with (
        rows_far_apart(machine, x, stride) as address,
        machine.buffers(x=x, factor=factor, out=Output(far)) as placed,
    ):
        stage = describe(HALF, placed["x"], placed["factor"], 0.0, 0)
        stage.x = MatrixView(address, stride, 1)
        stage.out = placed["out"].pointer
        device = Device(80, 108, 163 * 1024)
        result = machine.run(lambda: launchers.rank_down(ctypes.byref(stage), 1, ctypes.byref(device)))
        result.assert_clean()
    assert torch.equal(far, near.out)


@pytest.mark.parametrize(
    ("name", "kind", "rows", "rank", "expected"),
    [
        ("a100", HALF, 8192, 16, (16, 16)),
        ("a100", MASTERS, 8192, 16, (32, 16)),
        ("a100", HALF, 8192, 64, (64, 64)),
        ("a100", MASTERS, 8192, 64, (64, 64)),
        ("a100", MASTERS, 16384, 32, (64, 32)),
        ("h100", HALF, 256, 64, (16, 16)),
        ("l4", HALF, 1024, 3, (32, 16)),
        ("b200", HALF, 64, 256, (16, 16)),
    ],
)
def test_the_choice_of_tiles(name, kind, rows, rank, expected, launchers):
    stage = RankDown(
        dtype=DTYPE_OF[kind.dtype], factor_dtype=DTYPE_OF[kind.adapters], rows=rows, columns=4096, rank=rank
    )
    chosen = launchers.choose_tile(ctypes.byref(stage), DEVICES[name].multiprocessors)
    assert divmod(chosen, 1000) == expected


def test_obstacles_name_what_is_in_the_way(launchers):
    def obstacle(**changes):
        stage = RankDown(
            arithmetic=Arithmetic.HALF,
            dtype=DTYPE_OF[BF16],
            factor_dtype=DTYPE_OF[BF16],
            rows=4,
            columns=64,
            rank=3,
        )
        stage.x, stage.factor = MatrixView(1 << 20, 64, 1), MatrixView((1 << 20) + 2, 5, 7)
        for name, value in changes.items():
            setattr(stage, name, value)
        text = launchers.obstacle(ctypes.byref(stage))
        return text and text.decode()

    assert obstacle() is None
    assert "rows" in obstacle(columns=63)
    assert "multiples of 16 bytes" in obstacle(x=MatrixView((1 << 20) + 8, 64, 1))
    assert "multiples of 16 bytes" in obstacle(x=MatrixView(1 << 20, 68, 1))
    assert obstacle(x=MatrixView(1 << 20, 68, 1), rows=1) is None
    assert "not contiguous" in obstacle(x=MatrixView(1 << 20, 1, 64))
    assert obstacle(arithmetic=Arithmetic.FLOAT32) == "fp32 arithmetic has no matrix units"
    assert "2^30" in obstacle(columns=1 << 31)


def test_kernels_spill_nothing(launchers):
    command = [_binary_tool("cuobjdump"), "-res-usage", launchers._name]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stacks = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage)
    assert len(stacks) == 2 * 3 * 2 * len(TILES) + 2 * len(TILES)
    assert all(stack == "0" for _, stack in stacks), stacks
