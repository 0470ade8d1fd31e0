"""The tensor-core rank-grad and the reduction of partial sums: every kind, layout and split against float64,
what they move, and what the compiler made of them."""

from __future__ import annotations

import ctypes
import itertools
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch

from fused_lora import reference
from tests.emulator import Machine, Output
from tests.emulator.mutations import unnoticed_mutants
from tests.emulator.static_report import static_report
from tests.kernels.rank_grad import (
    CSRC,
    KINDS,
    SOURCES,
    Kind,
    add_up,
    assert_close,
    device_of,
    draw,
    far_apart,
    load_launchers,
    seed_of,
)
from tests.kernels.structures import (
    DTYPE_OF,
    Arithmetic,
    Dropout,
    MatrixView,
    Partials,
    RankGrad,
)
from tests.operands import BF16, F16, F32

ORDERS = ("forward", "reverse", "random")
BF16_HALF, BF16_ROUNDED, BF16_MASTERS, F16_HALF, F16_MASTERS, TF32 = KINDS
BY_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)


@pytest.fixture(scope="module")
def launchers():
    return load_launchers()


@dataclass(frozen=True)
class Grad:
    """One stage: out = alpha · drop(x)ᵀ · low, or its transpose."""

    rows: int
    columns: int
    rank: int
    transposed: bool = False
    splits: int = 1
    dropout_p: float = 0.0
    pitch_gap: int = 0  # elements between x's rows
    stride: int = 0  # of x's rows where they are far apart
    alpha: float = 1.5
    key: int = 1

    def operands(self, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
        x = draw(self.rows, self.columns, kind.dtype, self.key, gap=self.pitch_gap)
        return x, draw(self.rows, self.rank, kind.rank_dtype, self.key + 100)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rank, self.columns) if self.transposed else (self.columns, self.rank)

    def exact(self, kind: Kind, x: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The result in float64 and the sum of the magnitudes."""
        left, right = kind.rounded(x), kind.rounded(low)
        if self.dropout_p:
            seed = torch.tensor([seed_of(self.key)])
            left = left * reference.dropout_mask(seed, self.rows, self.columns, self.dropout_p)
        both = self.alpha * left.t() @ right, self.alpha * left.t().abs() @ right.abs()
        return (both[0].t(), both[1].t()) if self.transposed else both


def run(machine, launchers, kind, grads):
    """The stages in one launch, and where there are partial sums the reduction behind it."""
    outs, arrays = [], {}
    for i, grad in enumerate(grads):
        x, low = grad.operands(kind)
        outs.append(torch.empty(grad.shape, dtype=kind.adapters))
        arrays |= {f"x{i}": x, f"low{i}": low, f"out{i}": Output(outs[i])}
        arrays[f"seed{i}"] = torch.tensor([seed_of(grad.key)])
        if grad.splits > 1:
            arrays[f"partials{i}"] = Output(torch.empty(grad.splits, *grad.shape))
    with machine.buffers(**arrays) as placed, ExitStack() as stack:
        stages = (RankGrad * len(grads))()
        sums = []
        for i, grad in enumerate(grads):
            partials = placed[f"partials{i}"].pointer if grad.splits > 1 else None
            out = placed[f"out{i}"].pointer
            view = MatrixView.of(placed[f"x{i}"])
            if grad.stride:
                view = stack.enter_context(far_apart(machine, arrays[f"x{i}"], grad.stride))
            stages[i] = RankGrad(
                arithmetic=kind.arithmetic,
                dtype=DTYPE_OF[kind.dtype],
                rows=grad.rows,
                columns=grad.columns,
                rank=grad.rank,
                x=view,
                low=placed[f"low{i}"].pointer,
                alpha=grad.alpha,
                dropout=Dropout.of(grad.dropout_p, placed[f"seed{i}"].pointer)
                if grad.dropout_p
                else Dropout.none(),
                transposed=grad.transposed,
                splits=grad.splits,
                partials=partials,
                out=out,
                out_dtype=DTYPE_OF[kind.adapters],
            )
            assert launchers.rank_grad_obstacle(ctypes.byref(stages[i])) is None
            if partials is not None:
                count = grad.columns * grad.rank
                sums.append(Partials(partials, grad.splits, count, out, DTYPE_OF[kind.adapters]))

        def launch():
            error = launchers.rank_grad(stages, len(grads))
            return error or add_up(launchers, sums)

        result = machine.run(launch)
    assert result.value == 0
    return outs, result


def check(machine, launchers, kind, *grads):
    outs, result = run(machine, launchers, kind, grads)
    result.assert_clean()
    for grad, out in zip(grads, outs, strict=True):
        exact, magnitude = grad.exact(kind, *grad.operands(kind))
        assert_close(out, exact, magnitude, str(grad))
    return outs, result


@BY_KIND
@pytest.mark.parametrize("order", ORDERS)
def test_both_gradients_in_one_launch(launchers, kind, order):
    machine = Machine(order=order, seed=1)
    of_a = Grad(129, 200, 16, transposed=True, splits=2, dropout_p=0.1, pitch_gap=24, key=1)
    of_b = Grad(129, 64, 16, splits=1, key=2)
    check(machine, launchers, kind, of_a, of_b)


# Ranks, rows, columns, layouts, splits and dropout, each value of one beside several of the others.
RANKS, ROWS, COLUMNS = (1, 3, 8, 16, 20, 32, 40, 64, 128, 256), (0, 1, 7, 129, 300), (64, 200, 576)
CASES = [
    Grad(
        ROWS[i % len(ROWS)],
        COLUMNS[(i // 2) % len(COLUMNS)] if rank < 128 else 64,
        rank,
        transposed=(i // 3 + j) % 2 == 1,
        splits=1 + (i + j) % 3 if ROWS[i % len(ROWS)] > 128 else 1,
        dropout_p=(0.0, 0.1, 0.75)[(i + 2 * j) % 3],
        pitch_gap=(0, 40)[(i + j) % 2],
        key=10 + i,
    )
    for i, (rank, j) in enumerate(itertools.product(RANKS, range(2)))
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_size(launchers, number):
    check(Machine(), launchers, KINDS[number % len(KINDS)], CASES[number])


@BY_KIND
@pytest.mark.parametrize("rank", [3, 16, 32, 64])
def test_every_tile_of_every_kind(launchers, kind, rank):
    grad = Grad(75, 136, rank, transposed=rank % 32 == 0, key=3)
    check(Machine(), launchers, kind, grad)
    check(Machine(), launchers, kind, replace(grad, transposed=not grad.transposed, dropout_p=0.5))


@BY_KIND
def test_no_rows_make_zeros(launchers, kind):
    for transposed in (False, True):
        (out,), _ = check(Machine(), launchers, kind, Grad(0, 64, 5, transposed=transposed))
        assert not out.any()


def test_everything_dropped_makes_zeros(launchers):
    (out,), _ = check(Machine(), launchers, BF16_HALF, Grad(40, 64, 8, dropout_p=1.0))
    assert not out.any()


@pytest.mark.parametrize("kind", [BF16_HALF, BF16_MASTERS, TF32], ids=str)
def test_what_is_dropped_may_be_anything(launchers, kind):
    """Infinities and NaNs where the mask drops: 0 · NaN is not 0."""
    grad = Grad(64, 64, 8, dropout_p=0.5)
    x, _ = grad.operands(kind)
    kept = reference.dropout_mask(torch.tensor([seed_of(grad.key)]), 64, 64, 0.5)
    spoilt = torch.where(kept, x, torch.tensor(float("nan"), dtype=x.dtype))

    class Spoilt(Grad):
        def operands(self, kind):
            return spoilt, super().operands(kind)[1]

    (ours,), result = run(Machine(), launchers, kind, [Spoilt(**vars(grad))])
    result.assert_clean()
    (clean,), _ = run(Machine(), launchers, kind, [grad])
    assert torch.equal(ours, clean)


@pytest.mark.parametrize("kind", [BF16_MASTERS, F16_MASTERS], ids=str)
def test_masters_keep_infinities_and_nans(launchers, kind):
    grad = Grad(8, 64, 2)

    class Special(Grad):
        def operands(self, kind):
            x, low = torch.ones(8, 64, dtype=kind.dtype), torch.ones(8, 2)
            low[3, 0], low[5, 1] = float("inf"), float("nan")
            return x, low

    (out,), _ = run(Machine(), launchers, kind, [Special(**vars(grad))])
    assert torch.isinf(out[:, 0]).all()
    assert torch.isnan(out[:, 1]).all()


@BY_KIND
def test_the_order_of_blocks_does_not_change_a_bit(launchers, kind):
    grads = [Grad(200, 136, 20, splits=3, dropout_p=0.1), Grad(200, 64, 20, transposed=True, splits=2)]
    results = [
        run(Machine(order=order, seed=5, check_races=False), launchers, kind, grads)[0] for order in ORDERS
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_splits_fill_the_device_and_stay_cheap(launchers):
    device = device_of("a100")

    def splits(rows, columns, rank, dtype=BF16):
        stage = RankGrad(
            arithmetic=Arithmetic.HALF, dtype=DTYPE_OF[dtype], rows=rows, columns=columns, rank=rank
        )
        return launchers.rank_grad_splits(ctypes.byref(stage), 1, ctypes.byref(device))

    assert splits(8192, 4096, 16) == 3  # 64 column tiles: 192 blocks for 108 SMs
    assert splits(8192, 65536, 16) == 1  # the columns alone fill it
    assert splits(1, 64, 16) == splits(0, 64, 16) == 1
    for rows, columns, rank in itertools.product((65, 129, 2048, 100_000), (64, 576, 4096), (1, 16, 64, 256)):
        n = splits(rows, columns, rank)
        assert n >= 1
        assert n == 1 or n * columns * rank * 8 <= rows * columns * 2 / 2
        tile_rows = 64 if rank <= 16 else 32
        tiles = -(-rows // tile_rows)
        share = -(-tiles // n)
        assert (n - 1) * share < tiles  # none is empty


def test_obstacles_say_why(launchers):
    good = RankGrad(
        arithmetic=Arithmetic.HALF,
        dtype=DTYPE_OF[BF16],
        rows=5,
        columns=64,
        rank=3,
        x=MatrixView(256, 64, 1),
        low=2,
    )

    def obstacle(**changes):
        stage = RankGrad.from_buffer_copy(good)
        for name, value in changes.items():
            setattr(stage, name, value)
        return launchers.rank_grad_obstacle(ctypes.byref(stage))

    assert obstacle() is None
    assert b"matrix units" in obstacle(arithmetic=Arithmetic.FLOAT32)
    assert b"not contiguous" in obstacle(x=MatrixView(256, 1, 64))
    assert b"multiples of 16 bytes" in obstacle(columns=60)
    assert b"multiples of 16 bytes" in obstacle(x=MatrixView(264, 64, 1))
    assert b"multiples of 16 bytes" in obstacle(x=MatrixView(256, 68, 1))
    assert obstacle(x=MatrixView(256, 0, 1)) is None  # one row for all


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", [BF16_HALF, BF16_MASTERS, TF32], ids=str)
@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_aligned_shapes_waste_nothing(launchers, kind, rank, transposed):
    """X crosses global memory once, every request has the least sectors, and no bank is asked twice."""
    rows, columns = 128, 256
    grad = Grad(rows, columns, rank, transposed=transposed, splits=2, dropout_p=0.1)
    _, result = check(Machine(), launchers, kind, grad)
    launch, reduction = result.launches
    x, partials = launch.buffers["x0"], launch.buffers["partials0"]
    assert x.bytes_read == x.unique_read == rows * columns * kind.dtype.itemsize
    low = launch.buffers["low0"]
    assert low.unique_read == rows * rank * kind.rank_dtype.itemsize
    assert low.bytes_read == low.unique_read * columns // (64 if rank <= 16 else 128)
    assert partials.bytes_written == partials.unique_written == 2 * columns * rank * 4
    assert reduction.buffers["partials0"].bytes_read == partials.unique_written
    for one in result.launches:
        for step in one.steps:
            if not step.opcode.startswith("ld.global.u64"):  # the seed: 8 bytes of a sector
                assert step.sectors == step.ideal_sectors, step
            assert step.wavefronts == step.ideal_wavefronts, step
    assert sum(n for opcode, n in launch.instructions.items() if opcode.startswith("mma.")) > 0


def test_more_ranks_than_a_tile_read_x_again_from_l2_alone(launchers):
    _, result = check(Machine(), launchers, BF16_HALF, Grad(64, 128, 256))
    x = result.only.buffers["x0"]
    assert x.unique_read == 64 * 128 * 2
    assert x.bytes_read == 4 * x.unique_read


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("count", "splits"), [(1, 1), (7, 3), (1024, 5), (4 * 513, 17), (64, 0)])
def test_partial_sums_are_added_in_order(launchers, dtype, count, splits):
    sizes = [(count, splits), (count + 4, splits + 2)]
    partials = [torch.randn(s, c, generator=torch.Generator().manual_seed(c)) for c, s in sizes]
    outs = [torch.empty(c, dtype=dtype) for c, _ in sizes]
    machine = Machine()
    arrays = {f"partials{i}": p for i, p in enumerate(partials)}
    arrays |= {f"out{i}": Output(out) for i, out in enumerate(outs)}
    with machine.buffers(**arrays) as placed:
        sums = []
        for i, (c, s) in enumerate(sizes):
            pointers = placed[f"partials{i}"].pointer, placed[f"out{i}"].pointer
            sums.append(Partials(pointers[0], s, c, pointers[1], DTYPE_OF[dtype]))
        result = machine.run(lambda: add_up(launchers, sums))
    assert result.assert_clean().value == 0
    for out, parts in zip(outs, partials, strict=True):
        total = torch.zeros(parts.shape[1])
        for part in parts:
            total = total + part
        assert torch.equal(out, total.to(dtype))
    if count % 4 == 0 and splits:
        assert result.only.total("requests", "ld.global.v4.f32") > 0


def test_nothing_to_do_launches_nothing(launchers):
    assert not Machine().run(lambda: add_up(launchers, [])).launches
    _, result = run(Machine(), launchers, BF16_HALF, [Grad(5, 0, 3, pitch_gap=64)])
    assert not result.launches


def test_rows_may_lie_beyond_two_to_the_31st_elements(launchers):
    check(Machine(), launchers, BF16_HALF, Grad(20, 64, 8, stride=2**31 // 16 + 8))


# The last tile of five lies where the sums go next.
@pytest.mark.parametrize(
    ("kind", "grad"),
    [
        (BF16_HALF, Grad(5 * 64, 64, 16)),
        (BF16_MASTERS, Grad(5 * 64, 64, 3, transposed=True, dropout_p=0.3)),
        (BF16_MASTERS, Grad(4 * 32, 128, 64)),
        (TF32, Grad(5 * 32, 64, 16, dropout_p=0.3)),
    ],
    ids=str,
)
def test_every_synchronisation_is_needed(launchers, kind, grad):
    assert not unnoticed_mutants(lambda machine: run(machine, launchers, kind, [grad])[1])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(source):
    for report in static_report(source, arch="sm_80", include=[CSRC]):
        used = report.resources
        assert (used.spill_stores, used.spill_loads, used.stack) == (0, 0, 0), report.demangled
