"""The tensor-core lora-gemm: every tile, layout and element type against float64, what it moves, and what the
compiler made of it."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fused_lora import reference
from tests.emulator import Machine, Output
from tests.emulator.devices import DEVICES
from tests.emulator.machine import Launch, Result
from tests.emulator.mutations import unnoticed_mutants
from tests.emulator.oracles.conftest import load_launchers
from tests.emulator.oracles.cutlass import GEMMS
from tests.emulator.oracles.run import Operands, run_gemm
from tests.kernels import bridge
from tests.kernels.rank_grad import far_apart
from tests.kernels.structures import (
    DTYPE_OF,
    Arithmetic,
    Device,
    Dropout,
    LoraGemm,
    MatrixView,
)
from tests.operands import BF16, F16, F32

CSRC = Path(__file__).resolve().parents[2] / "csrc"
GEMM = CSRC / "kernels" / "lora_gemm"
ORDERS = ("forward", "reverse", "random")
LARGE, MEDIUM, FEW_ROWS = range(3)
TILES = {LARGE: (128, 128), MEDIUM: (64, 64), FEW_ROWS: (32, 64)}  # tf32's large tile has 64 columns
SEED = 0x1234_5678_9ABC_DEF0
ACCUMULATION = 2.0**-20  # what fp32 sums may lose of the sum of the magnitudes


@dataclass(frozen=True)
class Kind:
    """The dtype of x, W and out, that of the packed low-rank operands, and what products are made of."""

    dtype: torch.dtype
    packed: torch.dtype
    arithmetic: Arithmetic

    def rounded(self, operand: torch.Tensor) -> torch.Tensor:
        """An operand as the products see it."""
        if self.arithmetic != Arithmetic.TF32:
            return operand.double()
        bits = operand.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(F32).double()  # to nearest, ties away from zero


KINDS = [
    Kind(BF16, BF16, Arithmetic.HALF),
    Kind(F16, F16, Arithmetic.HALF),
    Kind(F16, BF16, Arithmetic.HALF_MASTERS),
    Kind(F32, F32, Arithmetic.TF32),
]
BY_KIND = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda k: f"{k.dtype}-{k.arithmetic.name}".replace("torch.", "")
)


@pytest.fixture(scope="module")
def launchers():
    sources = [*sorted(GEMM.glob("*_sm80.cu")), GEMM / "lora_gemm.cpp"]
    library = bridge.load("lora_gemm_launcher.cpp", sources, (LoraGemm, Device))
    library.obstacle.restype = ctypes.c_char_p
    library.packed_rank.restype = ctypes.c_int64
    library.packed_rank.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.choose_tile.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    return library


def draw(rows, columns, dtype, key, pitch=None):
    """rows×columns whose rows are `pitch` elements apart; NaN between them."""
    generator = torch.Generator().manual_seed(key)
    whole = torch.full((rows, pitch or columns), float("nan"), dtype=dtype)
    view = whole[:, :columns]
    return view.copy_(torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype))


@dataclass
class Run:
    out: torch.Tensor
    exact: torch.Tensor
    magnitude: torch.Tensor
    result: Result

    @property
    def launch(self) -> Launch:
        return self.result.assert_clean().only


def run(
    launchers,
    kind,
    rows,
    depth,
    columns,
    *,
    rank=8,
    depth_contiguous=True,
    tile=MEDIUM,
    bias=False,
    dropout_p=0.0,
    pitch_gap=0,
    far=None,
    addend=None,
    out_gap=0,
    machine=None,
):
    """A depth of zero has no X and no W. addend: one beside out ("apart"), or in its place ("out")."""
    machine = machine or Machine("a100")
    deep = launchers.packed_rank(kind.arithmetic, rank)
    per_chunk = 16 // kind.dtype.itemsize
    x = draw(rows, depth, kind.dtype, 1, depth + pitch_gap)
    if depth_contiguous:
        weight = draw(columns, depth, kind.dtype, 2, depth + pitch_gap).t()
        factor = draw(columns, deep, kind.packed, 3).t()
    else:
        weight = draw(depth, columns, kind.dtype, 2, columns + pitch_gap)
        factor = draw(deep, columns, kind.packed, 3, -(-columns // per_chunk) * per_chunk)
    low = draw(rows, deep, kind.packed, 4)
    placed = {"x": x, "weight": weight, "low": low, "factor": factor}
    placed["seed"] = torch.tensor([SEED])
    bias_values = draw(1, columns, kind.dtype, 5)[0] if bias else None
    if bias_values is not None:
        placed["bias"] = bias_values
    out = torch.empty(rows, columns + out_gap, dtype=kind.dtype)[:, :columns]
    added = draw(rows, columns, kind.dtype, 6, columns + out_gap)
    if addend == "apart":
        placed["addend"] = added
    if depth == 0:
        del placed["x"], placed["weight"]
    _, scale = reference.dropout_rule(dropout_p)
    given_out = out.copy_(added) if addend == "out" else Output(out)
    with machine.buffers(**placed, out=given_out) as buffers, ExitStack() as stack:
        views = {name: MatrixView.of(buffers[name]) for name in ("x", "weight") if name in buffers}
        if addend is not None:
            views |= {"addend": buffers["out" if addend == "out" else "addend"].pointer}
            views |= {"addend_stride": added.stride(0)}
        for name, stride in (far or {}).items():
            if name == "weight" and depth_contiguous:
                views[name] = stack.enter_context(far_apart(machine, weight.t(), stride)).transposed()
            else:
                views[name] = stack.enter_context(far_apart(machine, placed[name], stride))
        stage = LoraGemm(
            arithmetic=kind.arithmetic,
            dtype=DTYPE_OF[kind.dtype],
            rows=rows,
            depth=depth,
            columns=columns,
            rank=rank,
            **views,
            bias=buffers["bias"].pointer if bias else None,
            dropout=Dropout.of(dropout_p, buffers["seed"].pointer) if dropout_p else Dropout.none(),
            out=buffers["out"].pointer,
            out_stride=out.stride(0),
            packed_low=buffers["low"].pointer,
            packed_factor=buffers["factor"].pointer,
            packed_factor_stride=factor.stride(1) if depth_contiguous else factor.stride(0),
        )
        assert launchers.obstacle(ctypes.byref(stage)) is None
        result = machine.run(lambda: launchers.lora_gemm(ctypes.byref(stage), tile))
    assert result.value == 0
    delta = kind.rounded(low) @ kind.rounded(factor)
    size = kind.rounded(low).abs() @ kind.rounded(factor).abs()
    if dropout_p:
        mask = reference.dropout_mask(placed["seed"], rows, columns, dropout_p) * scale
        delta, size = delta * mask, size * mask
    exact = delta + kind.rounded(x) @ kind.rounded(weight)
    magnitude = size + kind.rounded(x).abs() @ kind.rounded(weight).abs()
    if bias_values is not None:
        exact = exact + bias_values.double()
    if addend is not None:
        exact, magnitude = exact + added.double(), magnitude + added.double().abs()
    return Run(out, exact, magnitude, result)


def assert_right(result):
    result.result.assert_clean()
    rounding = torch.finfo(result.out.dtype).eps / 2 if result.out.dtype != F32 else 2.0**-24
    bound = rounding * result.exact.abs() + ACCUMULATION * result.magnitude + 1e-30
    error = (result.out.double() - result.exact).abs()
    assert (error <= bound).all(), (error / bound).max()


@BY_KIND
@pytest.mark.parametrize("depth_contiguous", [True, False], ids=["N×K", "K×N"])
@pytest.mark.parametrize("tile", TILES)
def test_ragged_shapes_are_right_and_clean(kind, depth_contiguous, tile, launchers):
    """Shapes that fill no tile: rows and columns at the edge, a last tile of the reduction that is ragged."""
    rows, columns = TILES[tile][0] + 9, TILES[tile][1] + 24
    order = ORDERS[(tile + depth_contiguous) % 3]
    result = run(
        launchers,
        kind,
        rows,
        136,
        columns,
        rank=5,
        depth_contiguous=depth_contiguous,
        tile=tile,
        bias=depth_contiguous,
        dropout_p=0.0 if depth_contiguous else 0.3,
        pitch_gap=8,
        machine=Machine("a100", order=order, seed=tile),
    )
    assert_right(result)


@BY_KIND
@pytest.mark.parametrize("depth", [8, 32, 40, 96, 200])
@pytest.mark.parametrize("rank", [1, 16, 40, 100])
def test_every_number_of_tiles_of_the_reduction_and_of_the_rank(kind, depth, rank, launchers):
    """From fewer tiles than stages to several rounds of them."""
    assert_right(run(launchers, kind, 3, depth, 16, rank=rank, tile=FEW_ROWS, dropout_p=0.5))


@pytest.mark.parametrize("columns", [1, 7, 65])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=["bf16", "tf32"])
def test_rows_of_the_output_may_begin_anywhere(kind, columns, launchers):
    assert_right(run(launchers, kind, 5, 64, columns, bias=True))


@BY_KIND
@pytest.mark.parametrize("depth", [0, 72])
@pytest.mark.parametrize("tile", TILES)
def test_what_is_there_is_added(kind, depth, tile, launchers):
    """From beside the output and in its place, to a frozen product or to none, and rounded once."""
    rows, columns = TILES[tile][0] + 9, TILES[tile][1] + 24
    options = {"rank": 21, "tile": tile, "depth_contiguous": depth == 0, "dropout_p": 0.3, "bias": depth > 0}
    apart = run(launchers, kind, rows, depth, columns, addend="apart", out_gap=8, **options)
    assert_right(apart)
    in_place = run(launchers, kind, rows, depth, columns, addend="out", **options)
    assert_right(in_place)
    assert torch.equal(apart.out, in_place.out)


@pytest.mark.parametrize(("columns", "out_gap"), [(1, 0), (7, 0), (65, 0), (64, 3), (7, 1)])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=["bf16", "tf32"])
def test_its_rows_may_begin_anywhere(kind, columns, out_gap, launchers):
    for addend in ("apart", "out"):
        assert_right(run(launchers, kind, 37, 0, columns, addend=addend, out_gap=out_gap))


def test_one_row_and_one_column(launchers):
    assert_right(run(launchers, KINDS[0], 1, 64, 1, tile=FEW_ROWS))
    assert_right(run(launchers, KINDS[0], 1, 0, 1, tile=FEW_ROWS, addend="out"))


@pytest.mark.parametrize("depth_contiguous", [True, False])
def test_dropping_everything_leaves_the_frozen_product(depth_contiguous, launchers):
    result = run(launchers, KINDS[0], 40, 64, 72, dropout_p=1.0, depth_contiguous=depth_contiguous)
    assert_right(result)


@BY_KIND
@pytest.mark.parametrize("depth_contiguous", [True, False], ids=["N×K", "K×N"])
@pytest.mark.parametrize("tile", TILES)
def test_aligned_shapes_waste_no_sector_and_have_no_bank_conflict(kind, depth_contiguous, tile, launchers):
    rows, columns = TILES[tile][0], 2 * TILES[tile][1]
    result = run(
        launchers,
        kind,
        rows,
        128,
        columns,
        depth_contiguous=depth_contiguous,
        tile=tile,
        bias=depth_contiguous,
        dropout_p=0.0 if depth_contiguous else 0.1,
    )
    assert_right(result)
    launch = result.launch
    assert launch.total("sectors") == launch.total("ideal_sectors") > 0
    assert launch.total("wavefronts") == launch.total("ideal_wavefronts") > 0
    itemsize = kind.dtype.itemsize
    assert launch.buffers["x"].unique_read == rows * 128 * itemsize
    assert launch.buffers["weight"].unique_read == launch.buffers["weight"].bytes_read
    assert launch.buffers["out"].bytes_written == launch.buffers["out"].unique_written
    assert launch.buffers["out"].unique_written == rows * columns * itemsize


@BY_KIND
@pytest.mark.parametrize("depth", [0, 64])
@pytest.mark.parametrize("tile", TILES)
def test_what_is_there_is_read_once_and_by_whole_sectors(kind, depth, tile, launchers):
    rows, columns = TILES[tile][0], 2 * TILES[tile][1]
    result = run(launchers, kind, rows, depth, columns, tile=tile, addend="out")
    assert_right(result)
    launch = result.launch
    assert launch.total("sectors") == launch.total("ideal_sectors") > 0
    assert launch.total("wavefronts") == launch.total("ideal_wavefronts") > 0
    out = launch.buffers["out"]
    size = rows * columns * kind.dtype.itemsize
    assert out.bytes_read == out.unique_read == out.bytes_written == out.unique_written == size


def test_it_moves_what_cutlass_moves_and_the_low_rank_operands(launchers):
    """Total bytes, beside CUTLASS's plain GEMM of the same tile, 128×128×32, on the same shape."""
    rows, columns, depth = 256, 384, 160
    gemm = GEMMS[0]
    operands = Operands(gemm, rows, columns, depth)
    _, result = run_gemm(Machine("a100"), load_launchers(gemm.arch), gemm, operands)
    theirs = result.assert_clean().only.buffers
    ours = run(launchers, KINDS[0], rows, depth, columns, rank=16, tile=LARGE).launch.buffers
    blocks = (rows // 128) * (columns // 128)
    assert ours["x"].bytes_read == theirs["a"].bytes_read
    assert ours["weight"].bytes_read == theirs["b"].bytes_read
    assert ours["out"].bytes_written == theirs["d"].bytes_written
    # A block reads one tile of each, 128 rows or columns of 64 bytes: rank 16, padded to 32.
    assert ours["low"].bytes_read == ours["factor"].bytes_read == blocks * 128 * 64
    moved = {"x", "weight", "low", "factor", "out"}
    assert not any(t.bytes_read or t.bytes_written for name, t in ours.items() if name not in moved)


@pytest.mark.parametrize("depth_contiguous", [True, False], ids=["N×K", "K×N"])
def test_rows_may_lie_beyond_two_to_the_31st_elements(depth_contiguous, launchers):
    """Addresses alone: what lies between the rows is never committed. Pitches of just under 512 MiB."""
    far = 2**28 - 8
    machine = Machine("a100")
    for operand in ("x", "weight"):
        assert_right(
            run(
                launchers,
                KINDS[0],
                20,
                64,
                24,
                depth_contiguous=depth_contiguous,
                far={operand: far},
                machine=machine,
            )
        )


def test_the_same_bits_in_any_order_of_the_blocks(launchers):
    outs = [
        run(
            launchers, KINDS[0], 200, 96, 136, dropout_p=0.2, machine=Machine("a100", order=order, seed=2)
        ).out
        for order in ORDERS
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


# More tiles of the reduction than stages, so that each stage is filled anew; twelve with the rank's, so that
# the last read ends where the epilogue begins.
@pytest.mark.parametrize(
    ("kind", "tile", "options"),
    [
        (KINDS[0], LARGE, {"dropout_p": 0.3}),
        (KINDS[0], FEW_ROWS, {"depth_contiguous": False}),
        (KINDS[3], MEDIUM, {"bias": True}),
        (KINDS[0], MEDIUM, {"addend": "out"}),
    ],
    ids=str,
)
def test_every_synchronisation_is_needed(kind, tile, options, launchers):
    depth = 11 * 64 // kind.dtype.itemsize

    def launch(machine):
        return run(launchers, kind, 32, depth, 64, tile=tile, machine=machine, **options).result

    assert not unnoticed_mutants(launch)


def test_every_synchronisation_is_needed_where_there_is_no_frozen_product(launchers):
    def launch(machine):
        return run(
            launchers, KINDS[0], 32, 0, 64, rank=12 * 32, addend="apart", dropout_p=0.3, machine=machine
        ).result

    assert not unnoticed_mutants(launch)


def device_of(name):
    device = DEVICES[name]
    major, minor = device.compute_capability
    return Device(10 * major + minor, device.multiprocessors, device.shared_memory_per_block_optin)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "expected"),
    [
        # A long batch fills every device with large tiles.
        *((name, 8192, 4096, LARGE) for name in DEVICES),
        # SmolLM2's o_proj at 512 rows is 20 large tiles: most multiprocessors would idle.
        ("a100", 512, 576, MEDIUM),
        ("h100", 512, 576, MEDIUM),
        # Decoding: as few rows in a tile as there are.
        *((name, rows, 4096, FEW_ROWS) for name in DEVICES for rows in (1, 16, 32)),
        ("a100", 64, 4096, MEDIUM),
        # 58 multiprocessors are full where 170 are not.
        ("l4", 768, 1024, LARGE),
        ("rtx5090", 768, 1024, MEDIUM),
    ],
)
def test_the_choice_of_tiles(name, rows, columns, expected, launchers):
    device = device_of(name)
    assert launchers.choose_tile(rows, columns, Arithmetic.HALF, ctypes.byref(device)) == expected


def test_obstacles_name_what_is_in_the_way(launchers):
    def obstacle(**changes):
        x, weight = MatrixView(256, 64, 1), MatrixView(256, 1, 64)
        given = {
            "arithmetic": Arithmetic.HALF,
            "dtype": DTYPE_OF[BF16],
            "rows": 8,
            "depth": 64,
            "columns": 32,
        }
        stage = LoraGemm(**{**given, "rank": 8, "x": x, "weight": weight, "out": 256, **changes})
        text = launchers.obstacle(ctypes.byref(stage))
        return text and text.decode()

    assert obstacle() is None
    assert obstacle(out=258, columns=31) is None
    assert "do not begin at multiples of 16 bytes" in obstacle(x=MatrixView(258, 64, 1))
    assert "do not begin at multiples of 16 bytes" in obstacle(x=MatrixView(256, 65, 1))
    assert "are not contiguous" in obstacle(x=MatrixView(256, 128, 2))
    assert "not whole multiples of 16 bytes" in obstacle(depth=63)
    assert "weight's storage do not begin" in obstacle(weight=MatrixView(256, 1, 65))
    assert "neither dimension" in obstacle(weight=MatrixView(256, 2, 128))
    assert "no matrix units" in obstacle(arithmetic=Arithmetic.FLOAT32, dtype=DTYPE_OF[F32])
    assert "beyond the grid's limits" in obstacle(rows=2**31)
    assert "512 MiB or more apart" in obstacle(x=MatrixView(256, 2**28, 1))
    assert "512 MiB or more apart" in obstacle(weight=MatrixView(256, 1, 2**28))
    assert obstacle(rows=1, x=MatrixView(256, 3, 1)) is None  # one row has no pitch
