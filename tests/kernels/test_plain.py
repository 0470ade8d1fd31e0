"""The plain kernels: any stride, alignment, dtype and size, each product against float64."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fused_lora
from fused_lora import reference
from tests.emulator import Machine, Output, native
from tests.emulator.static_report import static_report
from tests.kernels import bridge
from tests.kernels.structures import (
    DTYPE_OF,
    MASK_DTYPE_OF,
    Arithmetic,
    Device,
    Dropout,
    LoraGemm,
    MaskCall,
    MatrixView,
    RankDown,
    RankGrad,
)
from tests.operands import BF16, F16, F32

CSRC = Path(__file__).resolve().parents[2] / "csrc"
PLAIN = CSRC / "kernels" / "plain"
KERNELS = [PLAIN / f"{name}_simt.cu" for name in ("rank_down", "lora_gemm", "rank_grad")]
ORDERS = ("forward", "reverse", "random")
SEED = 0x1234_5678_9ABC_DEF0
# What fp32 sums may lose of the sum of the magnitudes.
ACCUMULATION = 2.0**-20


@dataclass(frozen=True)
class Kind:
    """dtype of the long operands, dtype of the adapters, and what their products are made of."""

    dtype: torch.dtype
    adapters: torch.dtype
    arithmetic: Arithmetic

    @property
    def rank_dtype(self) -> torch.dtype:
        return self.dtype if self.arithmetic == Arithmetic.HALF else F32

    def rounded(self, factor: torch.Tensor) -> torch.Tensor:
        """An adapter's matrix as the products see it, in float64."""
        return (factor.to(self.dtype) if self.arithmetic == Arithmetic.HALF else factor).double()


KINDS = [
    Kind(F32, F32, Arithmetic.FLOAT32),
    *(
        Kind(half, adapters, arithmetic)
        for half in (BF16, F16)
        for adapters, arithmetic in (
            (half, Arithmetic.HALF),
            (F32, Arithmetic.HALF),
            (F32, Arithmetic.HALF_MASTERS),
        )
    ),
]
BY_KIND = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda k: f"{k.dtype}-{k.adapters}-{k.arithmetic.name}".replace("torch.", "")
)


@pytest.fixture(scope="module")
def plain():
    sources = [*KERNELS, PLAIN / "dropout_mask.cu", CSRC / "kernels" / "device.cu"]
    return bridge.load("plain_launcher.cpp", sources, (RankDown, LoraGemm, RankGrad, MaskCall, Device))


def draw(*shape, dtype, key, layout="rows"):
    """Numbers at any layout: rows or columns contiguous, every third element, or one row for all."""
    generator = torch.Generator().manual_seed(key)
    rows, columns = shape
    if layout == "columns":
        return draw(columns, rows, dtype=dtype, key=key).t()
    if layout == "sparse":
        wide = torch.full((2 * rows, 3 * columns + 1), float("nan"), dtype=dtype)
        view = wide[::2, 1::3]
        return view.copy_(draw(rows, columns, dtype=dtype, key=key))
    if layout == "expanded":
        return draw(1, columns, dtype=dtype, key=key).expand(rows, columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)


def drop(x, p):
    """x in float64 with what the mask drops as zeros; the scale is the caller's."""
    mask = reference.dropout_mask(torch.tensor([SEED]), *x.shape, p) if p else torch.ones(x.shape)
    return x.double() * mask


def assert_close(ours, exact, magnitude, what):
    rounding = torch.finfo(ours.dtype).eps / 2
    bound = rounding * exact.abs() + 2 * ACCUMULATION * magnitude
    excess = ((ours.double() - exact).abs() - bound).max() if exact.numel() else 0
    assert excess <= 0, f"{what}: {excess} beyond the bound"


@contextmanager
def dropout(machine, p):
    with machine.buffers(seed=torch.tensor([SEED])) as placed:
        yield Dropout.of(p, placed["seed"].pointer) if p else Dropout.none()


def rank_down(machine, plain, kind, x, factor, *, p=0.0, alpha=1.5):
    out = torch.empty(x.shape[0], factor.shape[1], dtype=kind.rank_dtype)
    arrays = {"x": x, "factor": factor, "out": Output(out)}
    with machine.buffers(**arrays) as placed, dropout(machine, p) as rule:
        stage = RankDown(
            arithmetic=kind.arithmetic,
            dtype=DTYPE_OF[kind.dtype],
            factor_dtype=DTYPE_OF[kind.adapters],
            rows=x.shape[0],
            columns=x.shape[1],
            rank=factor.shape[1],
            x=MatrixView.of(placed["x"]),
            factor=MatrixView.of(placed["factor"]),
            alpha=alpha,
            dropout=rule,
            out=placed["out"].pointer,
        )
        result = machine.run(lambda: plain.rank_down(ctypes.byref(stage)))
    assert result.value == 0
    return out, result


def check_rank_down(machine, plain, kind, rows, columns, rank, *, p=0.0, x="rows", factor="columns"):
    x = draw(rows, columns, dtype=kind.dtype, key=1, layout=x)
    factor = draw(columns, rank, dtype=kind.adapters, key=2, layout=factor)
    out, result = rank_down(machine, plain, kind, x, factor, p=p)
    result.assert_clean()
    left, right = drop(x, p), kind.rounded(factor)
    assert_close(out, 1.5 * left @ right, 1.5 * left.abs() @ right.abs(), "rank-down")
    return out, result


def lora_gemm(machine, plain, kind, low, factor, x, weight, bias, *, p=0.0, addend=None, in_place=False):
    """x and weight may have a depth of zero. in_place: the addend becomes the output."""
    out = addend if in_place else torch.empty(x.shape[0], weight.shape[1], dtype=kind.dtype)
    arrays = {"low": low, "factor": factor, "out": out if in_place else Output(out)}
    if x.numel():
        arrays |= {"x": x, "weight": weight}
    if addend is not None and not in_place:
        arrays["addend"] = addend
    if bias is not None:
        arrays["bias"] = bias
    with machine.buffers(**arrays) as placed, dropout(machine, p) as rule:
        stage = LoraGemm(
            arithmetic=kind.arithmetic,
            dtype=DTYPE_OF[kind.dtype],
            rows=x.shape[0],
            depth=x.shape[1],
            columns=weight.shape[1],
            rank=low.shape[1],
            **{name: MatrixView.of(placed[name]) for name in ("x", "weight") if name in placed},
            bias=placed["bias"].pointer if bias is not None else None,
            dropout=rule,
            addend=placed["out" if in_place else "addend"].pointer if addend is not None else None,
            addend_stride=0 if addend is None else addend.stride(0),
            out=placed["out"].pointer,
            out_stride=out.stride(0),
            low=placed["low"].pointer,
            factor=MatrixView.of(placed["factor"]),
            factor_dtype=DTYPE_OF[kind.adapters],
        )
        result = machine.run(lambda: plain.lora_gemm(ctypes.byref(stage)))
    assert result.value == 0
    return out, result


def check_lora_gemm(
    machine,
    plain,
    kind,
    rows,
    depth,
    columns,
    rank,
    *,
    p=0.0,
    bias=True,
    layouts=("rows", "columns", "rows"),
    addend=None,
    in_place=False,
):
    """addend: how far apart its rows are, if there is one."""
    x = draw(rows, depth, dtype=kind.dtype, key=1, layout=layouts[0])
    weight = draw(depth, columns, dtype=kind.dtype, key=2, layout=layouts[1])
    low = draw(rows, rank, dtype=kind.rank_dtype, key=3)
    factor = draw(rank, columns, dtype=kind.adapters, key=4, layout=layouts[2])
    added = draw(1, columns, dtype=kind.dtype, key=5)[0] if bias else None
    there = None
    if addend is not None:
        there = torch.full((rows, addend), float("nan"), dtype=kind.dtype)[:, :columns]
        there.copy_(draw(rows, columns, dtype=kind.dtype, key=6))
    was = torch.zeros(()) if there is None else there.double()
    options = {"p": p, "addend": there, "in_place": in_place}
    out, result = lora_gemm(machine, plain, kind, low, factor, x, weight, added, **options)
    result.assert_clean()
    delta = drop(low.double() @ kind.rounded(factor), p) * (reference.dropout_rule(p)[1] if p else 1)
    exact = delta + x.double() @ weight.double() + (added.double() if bias else 0) + was
    magnitude = x.double().abs() @ weight.double().abs() + low.double().abs() @ factor.double().abs() * 2
    assert_close(out, exact, magnitude + exact.abs(), "lora-gemm")
    return out, result


def rank_grad(machine, plain, kind, operands, *, p=0.0, splits=1, transposed=False, alpha=1.5):
    """One launch for all of `operands`, (x, low) each. Of several splits the sums of their partials."""
    outs, arrays = [], {}
    for i, (x, low) in enumerate(operands):
        shape = (low.shape[1], x.shape[1]) if transposed else (x.shape[1], low.shape[1])
        if splits > 1:
            outs.append(torch.empty(splits, *shape))
        else:
            outs.append(torch.empty(shape, dtype=kind.adapters))
        arrays |= {f"x{i}": x, f"low{i}": low, f"out{i}": Output(outs[i])}
    with machine.buffers(**arrays) as placed, dropout(machine, p) as rule:
        stages = (RankGrad * len(operands))()
        for i, (x, low) in enumerate(operands):
            out = placed[f"out{i}"].pointer
            stages[i] = RankGrad(
                arithmetic=kind.arithmetic,
                dtype=DTYPE_OF[kind.dtype],
                rows=x.shape[0],
                columns=x.shape[1],
                rank=low.shape[1],
                x=MatrixView.of(placed[f"x{i}"]),
                low=placed[f"low{i}"].pointer,
                alpha=alpha,
                dropout=rule,
                transposed=transposed,
                splits=splits,
                partials=out if splits > 1 else None,
                out=out if splits == 1 else None,
                out_dtype=DTYPE_OF[kind.adapters],
            )
        result = machine.run(lambda: plain.rank_grad(stages, len(operands)))
    assert result.value == 0
    return [out.double().sum(0).float() if splits > 1 else out for out in outs], result


def check_rank_grad(machine, plain, kind, rows, columns, rank, *, x="rows", p=0.0, **options):
    x = draw(rows, columns, dtype=kind.dtype, key=1, layout=x)
    low = draw(rows, rank, dtype=kind.rank_dtype, key=2)
    (out,), result = rank_grad(machine, plain, kind, [(x, low)], p=p, **options)
    result.assert_clean()
    left, right = drop(x, p).t(), low.double()
    exact, magnitude = 1.5 * left @ right, 1.5 * left.abs() @ right.abs()
    if options.get("transposed"):
        exact, magnitude = exact.t(), magnitude.t()
    assert_close(out, exact, magnitude, "rank-grad")
    return out, result


SIZES = [(1, 64, 3), (7, 203, 16), (129, 1023, 8), (33, 1, 1), (1, 1, 40)]


@BY_KIND
@pytest.mark.parametrize("order", ORDERS)
def test_rank_down_of_every_kind(plain, kind, order):
    machine = Machine(order=order, seed=1)
    check_rank_down(machine, plain, kind, 7, 203, 5, p=0.25)
    check_rank_down(machine, plain, kind, 33, 40, 33, x="sparse", factor="rows")


@pytest.mark.parametrize(("rows", "columns", "rank"), SIZES)
def test_rank_down_of_odd_sizes(plain, rows, columns, rank):
    check_rank_down(Machine(), plain, KINDS[0], rows, columns, rank)


@pytest.mark.parametrize("layout", ["rows", "columns", "sparse", "expanded"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_rank_down_drops_whatever_the_layout(plain, layout, p):
    check_rank_down(Machine(), plain, KINDS[2], 19, 147, 8, p=p, x=layout)


@pytest.mark.parametrize(("rank", "layout"), [(16, "rows"), (40, "columns")])
def test_rank_down_of_many_rows_takes_larger_tiles(plain, rank, layout):
    rows = 64 * 127 + 1
    _, result = check_rank_down(
        Machine(check_races=False), plain, KINDS[1], rows, 13, rank, p=0.3, x=layout, factor="sparse"
    )
    assert "TileILi64E" in result.only.kernel
    assert result.only.total("wavefronts") == result.only.total("ideal_wavefronts")


@BY_KIND
@pytest.mark.parametrize("order", ORDERS)
def test_lora_gemm_of_every_kind(plain, kind, order):
    machine = Machine(order=order, seed=1)
    check_lora_gemm(machine, plain, kind, 7, 203, 113, 5)
    check_lora_gemm(machine, plain, kind, 20, 33, 77, 3, p=0.25, bias=False, layouts=("rows",) * 3)


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 64, 64), (129, 1023, 64), (33, 1, 1), (1, 1, 9)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_lora_gemm_of_odd_sizes(plain, rows, depth, columns, p):
    check_lora_gemm(Machine(), plain, KINDS[0], rows, depth, columns, 16, p=p)


@pytest.mark.parametrize(
    "layouts",
    [
        ("columns", "rows", "columns"),
        ("sparse", "sparse", "sparse"),
        ("expanded", "columns", "expanded"),
    ],
)
def test_lora_gemm_of_any_strides(plain, layouts):
    check_lora_gemm(Machine(), plain, KINDS[3], 21, 70, 39, 24, p=0.3, layouts=layouts)


@BY_KIND
@pytest.mark.parametrize("depth", [0, 19])
@pytest.mark.parametrize(("columns", "stride"), [(43, 43), (44, 48), (44, 45)])
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
def test_what_is_there_is_added(plain, kind, depth, columns, stride, in_place):
    options = {"p": 0.3, "bias": depth > 0, "addend": stride, "in_place": in_place}
    _, result = check_lora_gemm(Machine(), plain, kind, 21, depth, columns, 5, **options)
    out = result.only.buffers["out"]
    assert out.bytes_written == out.unique_written == 21 * columns * kind.dtype.itemsize
    there = result.only.buffers["out" if in_place else "addend"]
    assert there.bytes_read == there.unique_read == out.unique_written


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("tile", [64, 128])
def test_lora_gemm_of_many_columns_takes_larger_tiles(plain, dtype, tile):
    kind = Kind(dtype, F32, Arithmetic.FLOAT32 if dtype == F32 else Arithmetic.HALF_MASTERS)
    _, result = check_lora_gemm(
        Machine(check_races=False), plain, kind, 17, 37, 127 * tile + 8, 5, p=0.3, layouts=("columns",) * 3
    )
    assert f"TileILi{tile}E" in result.only.kernel
    assert result.only.total("wavefronts") == result.only.total("ideal_wavefronts")


@BY_KIND
@pytest.mark.parametrize("order", ORDERS)
def test_rank_grad_of_every_kind(plain, kind, order):
    machine = Machine(order=order, seed=1)
    check_rank_grad(machine, plain, kind, 77, 70, 5, p=0.25, transposed=True)
    check_rank_grad(machine, plain, kind, 100, 31, 33, splits=3, x="sparse")


@pytest.mark.parametrize(("rows", "columns", "rank"), [*SIZES, (0, 20, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_rank_grad_of_odd_sizes(plain, rows, columns, rank, transposed):
    check_rank_grad(Machine(), plain, KINDS[0], rows, columns, rank, transposed=transposed)


@pytest.mark.parametrize("layout", ["rows", "columns", "sparse", "expanded"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_rank_grad_drops_whatever_the_layout(plain, layout, p):
    check_rank_grad(Machine(), plain, KINDS[2], 69, 83, 8, p=p, x=layout, splits=2)


def test_rank_grad_of_two_stages_in_one_launch(plain):
    kind = KINDS[3]
    operands = [
        (draw(90, columns, dtype=kind.dtype, key=columns), draw(90, rank, dtype=F32, key=rank))
        for columns, rank in ((150, 4), (20, 36))
    ]
    outs, result = rank_grad(Machine(), plain, kind, operands)
    assert len(result.assert_clean().launches) == 1
    for out, (x, low) in zip(outs, operands, strict=True):
        left, right = x.double().t(), low.double()
        assert_close(out, 1.5 * left @ right, 1.5 * left.abs() @ right.abs(), "rank-grad")


@pytest.mark.parametrize("rows", [0, 1, 31, 100, 1000, 8192, 10**7])
@pytest.mark.parametrize(("columns", "rank"), [(1, 1), (576, 16), (4096, 256)])
def test_rank_grad_splits_leave_no_share_empty(plain, rows, columns, rank):
    device = Device(80, 108, 163 * 1024)
    stage = RankGrad(rows=rows, columns=columns, rank=rank)
    splits = plain.rank_grad_splits(ctypes.byref(stage), ctypes.byref(device))
    tiles = -(-rows // 32)
    assert 1 <= splits <= 216
    assert splits == 1 or (splits - 1) * -(-tiles // splits) < tiles


def test_results_do_not_depend_on_the_order_of_blocks(plain):
    def results(order):
        machine = Machine(order=order, seed=2)
        kind = KINDS[2]
        return (
            check_rank_down(machine, plain, kind, 40, 203, 40, p=0.3)[0],
            check_lora_gemm(machine, plain, kind, 40, 203, 77, 9, p=0.3)[0],
            check_rank_grad(machine, plain, kind, 100, 203, 9, p=0.3, splits=3)[0],
        )

    first = results("forward")
    for order in ("reverse", "random"):
        assert all(torch.equal(a, b) for a, b in zip(first, results(order), strict=True))


@BY_KIND
def test_requests_are_ideal_where_rows_are_aligned(plain, kind):
    machine = Machine()
    _, down = check_rank_down(machine, plain, kind, 32, 256, 32, p=0.2)
    _, up = check_lora_gemm(machine, plain, kind, 32, 128, 64, 32, bias=False)
    _, grad = check_rank_grad(machine, plain, kind, 64, 64, 32, p=0.2)
    # W as backward has it, contiguous along the columns of C, and sums written transposed.
    _, back = check_lora_gemm(machine, plain, kind, 32, 128, 64, 32, bias=False, layouts=("rows",) * 3, p=0.2)
    _, transposed = check_rank_grad(machine, plain, kind, 64, 64, 32, transposed=True)
    for result in (down, up, grad, back, transposed):
        launch = result.only
        assert launch.total("wavefronts") == launch.total("ideal_wavefronts")
        # The seed is one number for all.
        long = [s for s in launch.steps if s.requests and s.sectors != s.ideal_sectors]
        assert not long, [(s.opcode, s.cuda_line, s.sectors, s.ideal_sectors) for s in long]


@pytest.mark.parametrize("wide", [F32, BF16])
def test_indices_pass_two_to_the_31(plain, wide):
    """Rows and columns so far apart that 32-bit element indices, or 32-bit byte offsets, would wrap."""
    machine = Machine()
    kind = Kind(wide, wide, Arithmetic.FLOAT32 if wide == F32 else Arithmetic.HALF)
    rows, columns, rank = 3, 4, 2
    far = 2**31 + 11
    for row_stride, column_stride in ((far, 1), (1, far)):
        x = draw(rows, columns, dtype=wide, key=1)
        factor = draw(columns, rank, dtype=wide, key=2)
        placed = []

        def spread(matrix, strides=(row_stride, column_stride), placed=placed):
            item = matrix.element_size()
            count = sum((n - 1) * s for n, s in zip(matrix.shape, strides, strict=True)) + 1
            address = machine.allocate(count * item)
            placed.append(address)
            for i, row in enumerate(matrix):
                for j, value in enumerate(row):
                    at = address + (i * strides[0] + j * strides[1]) * item
                    native.library().emulator_write(at, value.data_ptr(), item)
            return MatrixView(address, *strides)

        fields = {"arithmetic": kind.arithmetic, "dtype": DTYPE_OF[wide]}
        down = torch.empty(rows, rank, dtype=wide)
        up = torch.empty(rows, rank, dtype=wide)
        grad = torch.empty(columns, rank, dtype=wide)
        low = draw(rows, rank, dtype=wide, key=3)
        outputs = {"down": Output(down), "up": Output(up), "grad": Output(grad), "low": low}
        with machine.buffers(**outputs) as buffers:
            far_x, far_factor, far_square = spread(x), spread(factor), spread(factor[:rank])
            stages = (
                RankDown(
                    **fields,
                    factor_dtype=DTYPE_OF[wide],
                    rows=rows,
                    columns=columns,
                    rank=rank,
                    x=far_x,
                    factor=far_factor,
                    alpha=1,
                    dropout=Dropout.none(),
                    out=buffers["down"].pointer,
                ),
                LoraGemm(
                    **fields,
                    rows=rows,
                    depth=columns,
                    columns=rank,
                    rank=rank,
                    x=far_x,
                    weight=far_factor,
                    dropout=Dropout.none(),
                    out=buffers["up"].pointer,
                    out_stride=up.stride(0),
                    low=buffers["low"].pointer,
                    factor=far_square,
                    factor_dtype=DTYPE_OF[wide],
                ),
                RankGrad(
                    **fields,
                    rows=rows,
                    columns=columns,
                    rank=rank,
                    x=far_x,
                    low=buffers["low"].pointer,
                    alpha=1,
                    dropout=Dropout.none(),
                    splits=1,
                    out=buffers["grad"].pointer,
                    out_dtype=DTYPE_OF[wide],
                ),
            )
            calls = (
                lambda s=stages: plain.rank_down(ctypes.byref(s[0])),
                lambda s=stages: plain.lora_gemm(ctypes.byref(s[1])),
                lambda s=stages: plain.rank_grad(ctypes.byref(s[2]), 1),
            )
            for call in calls:
                assert machine.run(call).assert_clean().value == 0
        for address in placed:
            machine.free(address)
        x, factor, low = x.double(), factor.double(), low.double()
        assert_close(down, x @ factor, x.abs() @ factor.abs(), "rank-down")
        assert_close(up, x @ factor + low @ factor[:rank], x.abs() @ factor.abs() + 9, "lora-gemm")
        assert_close(grad, x.t() @ low, x.t().abs() @ low.abs(), "rank-grad")


@pytest.mark.parametrize("dtype", MASK_DTYPE_OF)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("rows", "columns", "row_offset", "column_offset"),
    [(5, 64, 0, 0), (7, 203, 3, 5), (1, 1, 2**33 + 1, 2**36 + 7), (300, 16, 1, 8)],
)
def test_dropout_mask_is_the_cpu_path_s(plain, dtype, order, rows, columns, row_offset, column_offset):
    machine = Machine(order=order)
    keep, _ = reference.dropout_rule(0.3)
    out = torch.empty(rows, columns, dtype=dtype)
    seed = torch.tensor([-SEED])
    with machine.buffers(seed=seed, out=Output(out)) as placed:
        call = MaskCall(
            seed=placed["seed"].pointer,
            keep=keep,
            rows=rows,
            columns=columns,
            row_offset=row_offset,
            column_offset=column_offset,
            dtype=MASK_DTYPE_OF[dtype],
            out=placed["out"].pointer,
        )
        result = machine.run(lambda: plain.dropout_mask(ctypes.byref(call)))
    result.assert_clean()
    assert result.value == 0
    offsets = {"row_offset": row_offset, "column_offset": column_offset}
    assert torch.equal(out, fused_lora.dropout_mask(seed, rows, columns, 0.3, dtype=dtype, **offsets))
    if columns % 8 == 0:
        assert result.only.total("sectors", "st") == result.only.total("ideal_sectors", "st")


@pytest.mark.parametrize(("name", "expected"), [("a100", (80, 108)), ("rtx5090", (120, 170))])
def test_current_device_is_described(plain, name, expected):
    machine = Machine(name)
    found = Device()
    assert machine.run(lambda: plain.current_device(ctypes.byref(found))).value == 0
    assert (found.compute_capability, found.multiprocessors) == expected
    assert found.shared_memory_per_block == machine.device.shared_memory_per_block_optin


def test_nothing_is_launched_where_there_is_nothing_to_do(plain):
    machine = Machine()
    result = machine.run(
        lambda: (
            plain.rank_down(ctypes.byref(RankDown(rank=4))),
            plain.lora_gemm(ctypes.byref(LoraGemm(columns=4))),
            plain.rank_grad(ctypes.byref(RankGrad(rows=4, splits=1)), 1),
            plain.dropout_mask(ctypes.byref(MaskCall(rows=4))),
        )
    )
    assert not any(result.value)
    assert not result.launches


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_spill_nothing(source):
    for report in static_report(source, arch="sm_80", include=[CSRC]):
        assert report.resources.spill_stores == report.resources.stack == 0, report.demangled
