"""g and dB by one read of dy: every kind, size and packing against float64, and what it moves."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch

from tests.emulator import Machine, Output
from tests.emulator.mutations import unnoticed_mutants
from tests.kernels.rank_grad import (
    KINDS,
    Kind,
    add_up,
    assert_close,
    device_of,
    draw,
    far_apart,
    load_launchers,
)
from tests.kernels.structures import (
    DTYPE_OF,
    Arithmetic,
    Dropout,
    MatrixView,
    PackFactor,
    Partials,
    RankDown,
    RankDownGrad,
    RankGrad,
)
from tests.operands import BF16, F32

ORDERS = ("forward", "reverse", "random")
BF16_HALF, BF16_ROUNDED, BF16_MASTERS, F16_HALF, F16_MASTERS, TF32 = KINDS
BY_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)
SLICE = 128  # rows of a block


@pytest.fixture(scope="module")
def launchers():
    return load_launchers()


@dataclass(frozen=True)
class Call:
    rows: int
    columns: int
    rank: int
    pitch_gap: int = 0
    stride: int = 0  # of dy's rows where they are far apart
    factor_by_column: bool = False  # B stored transposed
    transposed: bool = False
    direct: bool = False  # one slice's dB straight to its place
    packs: bool = True
    partner: int = 0  # extent of the other adapter matrix, 0 for none
    depth_contiguous: bool = True
    down_alpha: float = 0.75
    grad_alpha: float = 1.5

    def operands(self, kind: Kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """dy, B, h and the partner."""
        factor = draw(self.columns, self.rank, kind.adapters, 2)
        if self.factor_by_column:
            factor = factor.t().contiguous().t()
        return (
            draw(self.rows, self.columns, kind.dtype, 1, gap=self.pitch_gap),
            factor,
            draw(self.rows, self.rank, kind.rank_dtype, 3),
            draw(self.partner, self.rank, kind.adapters, 4),
        )


@dataclass
class Results:
    g: torch.Tensor
    grad: torch.Tensor
    packed: torch.Tensor
    partner: torch.Tensor


def packed_dtype(kind):
    return BF16 if kind.arithmetic == Arithmetic.HALF_MASTERS else kind.dtype


def run(machine, launchers, kind, call):
    dy, factor, low, other = call.operands(kind)
    deep = launchers.packed_rank(kind.arithmetic, call.rank)
    shape = (call.rank, call.columns) if call.transposed else (call.columns, call.rank)
    results = Results(
        torch.empty(call.rows, call.rank, dtype=kind.rank_dtype),
        torch.empty(shape, dtype=kind.adapters),
        torch.empty(call.rows, deep, dtype=packed_dtype(kind)),
        torch.empty(
            (call.partner, deep) if call.depth_contiguous else (deep, call.partner), dtype=packed_dtype(kind)
        ),
    )
    splits = max(-(-call.rows // SLICE), 1)
    arrays = {"dy": dy, "factor": factor, "low": low, "other": other}
    arrays |= {name: Output(tensor) for name, tensor in vars(results).items()}
    if not call.direct:
        arrays["partials"] = Output(torch.empty(splits, *shape))
    with machine.buffers(**arrays) as placed, ExitStack() as stack:
        partials = None if call.direct else placed["partials"].pointer
        x = MatrixView.of(placed["dy"])
        if call.stride:
            x = stack.enter_context(far_apart(machine, dy, call.stride))
        common = {
            "arithmetic": kind.arithmetic,
            "dtype": DTYPE_OF[kind.dtype],
            "rows": call.rows,
            "columns": call.columns,
            "rank": call.rank,
            "x": x,
            "dropout": Dropout.none(),
        }
        partner = PackFactor(
            factor=MatrixView.of(placed["other"]),
            factor_dtype=DTYPE_OF[kind.adapters],
            extent=call.partner,
            rank=call.rank,
            depth_contiguous=call.depth_contiguous,
            stride=deep if call.depth_contiguous else call.partner,
            packed=placed["partner"].pointer if call.partner else None,
        )
        down = RankDown(
            **common,
            factor_dtype=DTYPE_OF[kind.adapters],
            factor=MatrixView.of(placed["factor"]),
            alpha=call.down_alpha,
            out=placed["g"].pointer,
            packed=placed["packed"].pointer if call.packs else None,
            partner=partner,
        )
        grad = RankGrad(
            **common,
            low=placed["low"].pointer,
            alpha=call.grad_alpha,
            transposed=call.transposed,
            splits=splits,
            partials=partials,
            out=placed["grad"].pointer,
            out_dtype=DTYPE_OF[kind.adapters],
        )
        stage = RankDownGrad(down, grad)
        device = device_of("a100")
        assert launchers.rank_down_grad_splits(ctypes.byref(stage), ctypes.byref(device)) == splits
        sums = []
        if not call.direct:
            count = call.columns * call.rank
            sums.append(Partials(partials, splits, count, grad.out, grad.out_dtype))

        def launch():
            error = launchers.rank_down_grad(ctypes.byref(stage))
            return error or add_up(launchers, sums)

        result = machine.run(launch)
    assert result.value == 0
    return results, result


def packed_of(kind, numbers, deep, order):
    """lora_gemm's operand as stages.h defines it, of numbers in float32."""
    if kind.arithmetic != Arithmetic.HALF_MASTERS:
        parts = [numbers.to(packed_dtype(kind))]
    else:
        high = numbers.to(BF16)
        parts = [{"high": high, "low": (numbers - high.float()).to(BF16)}[part] for part in order]
    packed = torch.zeros(numbers.shape[0], deep, dtype=packed_dtype(kind))
    whole = torch.cat(parts, dim=1)
    packed[:, : whole.shape[1]] = whole
    return packed


def check(machine, launchers, kind, call):
    results, result = run(machine, launchers, kind, call)
    result.assert_clean()
    dy, factor, low, other = call.operands(kind)
    left, right = kind.rounded(dy), kind.rounded(factor)
    exact, magnitude = call.down_alpha * left @ right, call.down_alpha * left.abs() @ right.abs()
    assert_close(results.g, exact, magnitude, f"g of {call}")
    right = kind.rounded(low)
    exact, magnitude = call.grad_alpha * left.t() @ right, call.grad_alpha * left.t().abs() @ right.abs()
    if call.transposed:
        exact, magnitude = exact.t(), magnitude.t()
    assert_close(results.grad, exact, magnitude, f"dB of {call}")
    deep = results.packed.shape[1]
    if call.packs:
        # g in fp32 is what is packed, so its parts are those of g where g is fp32.
        expected = packed_of(kind, results.g.float(), deep, ("high", "high", "low"))
        assert torch.equal(results.packed, expected)
    if call.partner:
        expected = packed_of(kind, other.float(), deep, ("high", "low", "high"))
        assert torch.equal(results.partner, expected if call.depth_contiguous else expected.t())
    return results, result


@BY_KIND
@pytest.mark.parametrize("order", ORDERS)
def test_every_kind(launchers, kind, order):
    machine = Machine(order=order, seed=2)
    check(machine, launchers, kind, Call(300, 200, 16, pitch_gap=24, partner=72))


@BY_KIND
@pytest.mark.parametrize("rank", [1, 3, 8, 32])
def test_every_rank(launchers, kind, rank):
    if kind.arithmetic == Arithmetic.HALF_MASTERS and rank > 16:
        rank = 12
    check(Machine(), launchers, kind, Call(129, 136, rank, partner=65, depth_contiguous=False))


@pytest.mark.parametrize("rows", [0, 1, 7, 128])
@pytest.mark.parametrize("direct", [False, True])
def test_one_slice(launchers, rows, direct):
    kind = KINDS[rows % len(KINDS)]
    check(Machine(), launchers, kind, Call(rows, 64, 5, direct=direct, partner=16))
    check(Machine(), launchers, BF16_HALF, Call(rows, 64, 8, direct=direct, packs=False))


@BY_KIND
def test_any_strides_of_b_and_either_layout_of_db(launchers, kind):
    call = Call(140, 72, 12, factor_by_column=True, transposed=True, packs=False)
    check(Machine(), launchers, kind, call)


@BY_KIND
def test_the_order_of_blocks_does_not_change_a_bit(launchers, kind):
    call = Call(400, 136, 12, partner=40)
    results = [
        run(Machine(order=order, seed=5, check_races=False), launchers, kind, call)[0] for order in ORDERS
    ]
    for other in results[1:]:
        for name, tensor in vars(results[0]).items():
            assert torch.equal(tensor, getattr(other, name)), name


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        *((kind, rank) for kind in (BF16_HALF, BF16_MASTERS, TF32) for rank in (8, 16)),
        *((kind, 32) for kind in (BF16_HALF, TF32)),
    ],
    ids=str,
)
def test_aligned_shapes_waste_nothing(launchers, kind, rank):
    """dy crosses global memory once, every request has the least sectors, and no bank is asked twice."""
    rows, columns = 256, 256
    _, result = check(Machine(), launchers, kind, Call(rows, columns, rank))
    launch = result.launches[0]
    dy, partials = launch.buffers["dy"], launch.buffers["partials"]
    assert dy.bytes_read == dy.unique_read == rows * columns * kind.dtype.itemsize
    slices = rows // SLICE
    assert partials.bytes_written == partials.unique_written == slices * columns * rank * 4
    factor, low = launch.buffers["factor"], launch.buffers["low"]
    assert factor.unique_read == columns * rank * kind.adapters.itemsize
    assert factor.bytes_read == slices * factor.unique_read
    assert low.bytes_read == low.unique_read == rows * rank * kind.rank_dtype.itemsize
    for step in launch.steps:
        assert step.sectors == step.ideal_sectors, step
        assert step.wavefronts == step.ideal_wavefronts, step


def test_the_counted_bytes_decide(launchers):
    def obstacle(rows, rank, kind=BF16_HALF, columns=64):
        grad = RankGrad(
            arithmetic=kind.arithmetic,
            dtype=DTYPE_OF[kind.dtype],
            rows=rows,
            columns=columns,
            rank=rank,
            x=MatrixView(256, 4096, 1),
            splits=-(-rows // SLICE),
        )
        return launchers.rank_down_grad_obstacle(ctypes.byref(RankDownGrad(RankDown(), grad)))

    assert obstacle(1024, 1) is obstacle(1024, 32) is obstacle(64, 32) is None
    assert b"more than 32 ranks" in obstacle(1024, 33)
    assert b"more bytes" in obstacle(129, 32)  # the second slice has one row
    assert obstacle(129, 16) is None
    assert obstacle(1024, 16, BF16_MASTERS) is None
    assert b"matrix units" in obstacle(1024, 17, BF16_MASTERS)
    assert obstacle(1024, 32, TF32) is None
    assert b"matrix units" in obstacle(1024, 8, Kind(F32, F32, Arithmetic.FLOAT32))
    assert b"multiples of 16 bytes" in obstacle(1024, 8, columns=60)


@pytest.mark.parametrize("device", ["l4", "h100"])
def test_a_block_fits_every_device(launchers, device):
    check(Machine(device), launchers, TF32, Call(40, 64, 32))


def test_rows_may_lie_beyond_two_to_the_31st_elements(launchers):
    check(Machine(), launchers, BF16_HALF, Call(20, 64, 8, stride=2**31 // 16 + 8))


# The last tile of five lies where g's sums go next.
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (BF16_HALF, Call(130, 5 * 64, 16)),
        (BF16_MASTERS, Call(130, 5 * 64, 5, partner=64, depth_contiguous=False)),
        (TF32, Call(130, 5 * 32, 32)),
    ],
    ids=str,
)
def test_every_synchronisation_is_needed(launchers, kind, call):
    assert not unnoticed_mutants(lambda machine: run(machine, launchers, kind, call)[1])


def test_shares_that_the_kernel_does_not_make_are_refused(launchers):
    grad = RankGrad(dtype=DTYPE_OF[BF16], rows=300, columns=64, rank=4, splits=2)
    assert launchers.rank_down_grad(ctypes.byref(RankDownGrad(RankDown(), grad))) != 0
