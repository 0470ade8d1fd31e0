"""Rows of one batch that belong to different adapters: each row is served, and each adapter trained, as if it
were alone; and of the low-rank operands a tile reads what its rows use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.emulator import Machine
from tests.emulator.mutations import unnoticed_mutants
from tests.kernels.call import Backward, Forward, Mode, load, run_as_graph, run_backward, run_forward
from tests.kernels.cases import KINDS, Kind, case_of, operands_of, peft_sequence, results_of
from tests.operands import Operands, assert_no_worse_than_torch, torch_sequence

BY_NAME = {kind.name: kind for kind in KINDS}
BF16, MASTERS, FP32, TF32 = (BY_NAME[name] for name in ("bf16", "bf16-masters", "fp32", "tf32"))
BASE = -1  # of a row without an adapter
ONE_LAUNCH, ONE_READ = "few rows in one launch", "one read of dy"


@pytest.fixture(scope="module")
def kernels():
    return load()


@dataclass(frozen=True)
class Batch:
    """Adapters of these ranks, stacked in their order, and which of them each row uses."""

    ranks: Sequence[int]
    rows: Sequence[int]

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    def window(self, adapter: int) -> tuple[int, int]:
        if adapter == BASE:
            return 0, 0
        begin = sum(self.ranks[:adapter])
        return begin, begin + self.ranks[adapter]

    def scaling(self, adapter: int) -> float:
        return 0.5 + adapter

    def rows_of(self, adapter: int) -> Tensor:
        return torch.tensor([i for i, own in enumerate(self.rows) if own == adapter], dtype=torch.int64)

    def row_adapters(self) -> Tensor:
        return row_adapters([(*self.window(adapter), self.scaling(adapter)) for adapter in self.rows])


def row_adapters(rows: Sequence[tuple[int, int, float]]) -> Tensor:
    windows = torch.tensor([row[:2] for row in rows], dtype=torch.int32).reshape(-1, 2)
    scaling = torch.tensor([row[2] for row in rows], dtype=torch.float32)
    return torch.cat([windows, scaling.view(torch.int32)[:, None]], dim=1)


def in_turn(batch_rows: int, adapters: int) -> list[int]:
    """Neighbouring rows use different adapters, and some none."""
    return [i * 7 % (adapters + 1) - 1 for i in range(batch_rows)]


def in_segments(batch_rows: int, adapters: int) -> list[int]:
    return sorted(in_turn(batch_rows, adapters))


def one_by_one(sequence: Callable[..., Tensor], batch: Batch) -> Callable[..., Tensor]:
    """Every adapter by itself, with its own A, B and scaling, and of its results its own rows."""

    def mixed(x, weight, lora_a, lora_b, bias, *, scaling, **options):
        y = torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype)
        for adapter in range(BASE, len(batch.ranks)):
            own = slice(*batch.window(adapter))
            matrices = weight, lora_a[own], lora_b[:, own], bias
            rows = batch.rows_of(adapter)
            if options["dropout_p"] == 0:
                y = y.index_copy(
                    0, rows, sequence(x[rows], *matrices, scaling=batch.scaling(adapter), **options)
                )
            else:  # the mask is of the whole batch
                whole = sequence(x, *matrices, scaling=batch.scaling(adapter), **options)
                y = y.index_copy(0, rows, whole[rows])
        return y

    return mixed


@dataclass
class Results:
    given: Operands
    dy: Tensor
    forward: Forward
    backward: Backward

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"y": self.forward.y, **self.backward.gradients}


def call(
    kernels, kind: Kind, batch: Batch, in_features, out_features, machine=None, spoil=None, **options
) -> Results:
    """Forward and backward. spoil: changes the operands and dy first."""
    given, dy = operands_of(
        case_of(kind, (len(batch.rows), in_features, out_features), batch.rank, **options)
    )
    if spoil is not None:
        spoil(given, dy)
    return run(kernels, kind, batch.row_adapters(), given, dy, machine)


def run(kernels, kind: Kind, adapters: Tensor, given, dy, machine=None, run_on_stream=None) -> Results:
    machine = machine or Machine("a100")
    mode = replace(kind.mode, row_adapters=adapters)
    options = {} if run_on_stream is None else {"run_on_stream": run_on_stream}
    forward = run_forward(kernels, machine, given, mode, **options)
    backward = run_backward(kernels, machine, dy, forward.h, given, mode, **options)
    for part in (forward.run, backward.run):
        assert len(part.result.assert_clean().launches) == part.planned_launches
    return Results(given, dy, forward, backward)


def assert_as_alone(kind: Kind, batch: Batch, results: Results) -> None:
    given, dy = results.given, results.dy
    sequence = peft_sequence if kind.mode.round_adapters else torch_sequence
    exact_y, exact = results_of(one_by_one(torch_sequence, batch), given.double(), dy.double())
    if kind.mode.allow_tf32:
        for name, right in {"y": exact_y, **exact}.items():
            error = results.tensors[name].double() - right
            assert error.norm() <= 2.0**-10 * right.norm(), name
        return
    own_y, own = results_of(one_by_one(sequence, batch), given, dy)
    assert_no_worse_than_torch(results.forward.y, own_y, exact_y, "y")
    for name, gradient in results.backward.gradients.items():
        if kind.has_masters and name != "x":  # two tf32 pieces beside torch's fp32
            error = gradient.double() - exact[name]
            assert error.norm() <= 2.0**-18 * exact[name].norm(), name
        else:
            assert_no_worse_than_torch(gradient, own[name], exact[name], f"gradient of {name}")


def assert_zeros_elsewhere(batch: Batch, h: Tensor) -> None:
    for row, adapter in enumerate(batch.rows):
        begin, end = batch.window(adapter)
        used = torch.zeros(batch.rank, dtype=torch.bool)
        used[begin:end] = True
        assert (h[row][~used] == 0).all(), row
        assert (h[row][used] != 0).any() == (end > begin), row


RANKS = (8, 16, 3, 40)
ORDERS = {"segments": in_segments, "turns": in_turn}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_serves_and_trains_each_adapter_as_though_it_were_alone(kernels, kind, order):
    batch = Batch(RANKS, ORDERS[order](130, len(RANKS)))
    results = call(kernels, kind, batch, 104, 72)
    assert_as_alone(kind, batch, results)
    assert_zeros_elsewhere(batch, results.forward.h)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", ["unaligned", "transposed"])
@pytest.mark.parametrize("kind", [BF16, MASTERS, FP32], ids=lambda kind: kind.name)
def test_plain_kernels_do_the_same(kernels, kind, layout, order):
    batch = Batch((5, 33), ORDERS[order](41, 2))
    results = call(kernels, kind, batch, 51, 43, layout=layout)
    assert "plain" in results.forward.run.description
    assert_as_alone(kind, batch, results)
    assert_zeros_elsewhere(batch, results.forward.h)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 9, 64])
@pytest.mark.parametrize("name", ["bf16", "fp16-autocast", "bf16-masters"])
def test_few_rows_in_one_launch_do_the_same(kernels, name, rows, order):
    kind = BY_NAME[name]
    batch = Batch((8, 1, 20) if kind.adapters == torch.float32 else (8, 17, 32), ORDERS[order](rows, 3))
    weight = "transposed" if rows == 9 else "rows"
    results = call(kernels, kind, batch, 136, 72, dropout_p=0.0, weight=weight)
    assert results.forward.run.description.startswith(ONE_LAUNCH)
    if rows > 1:
        assert_as_alone(kind, batch, results)
    assert_zeros_elsewhere(batch, results.forward.h)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kind", "rows", "ranks"),
    [(BF16, 250, (8, 4, 16)), (MASTERS, 120, (5, 8)), (TF32, 120, (16, 15))],
    ids=["bf16", "masters", "tf32"],
)
def test_g_and_db_by_one_read_of_dy_do_the_same(kernels, kind, rows, ranks, order):
    batch = Batch(ranks, ORDERS[order](rows, len(ranks)))
    results = call(kernels, kind, batch, 72, 200)
    assert ONE_READ in results.backward.run.description
    assert_as_alone(kind, batch, results)


@pytest.mark.parametrize("layout", ["dense", "unaligned"])
def test_no_row_needs_an_adapter(kernels, layout):
    batch = Batch(RANKS, [BASE] * 70)
    results = call(kernels, BF16, batch, 72, 64, layout=layout)
    assert_as_alone(BF16, batch, results)
    assert not results.forward.h.any()
    assert not results.backward.gradients["lora_a"].any()
    assert not results.backward.gradients["lora_b"].any()


def test_an_empty_batch_trains_nobody(kernels):
    results = call(kernels, BF16, Batch(RANKS, []), 144, 136)
    assert results.forward.y.shape == (0, 136)
    assert not results.backward.gradients["lora_a"].any()


@pytest.mark.parametrize("rows", [9, 100])
def test_windows_that_no_adapter_has_are_cut_to_the_ranks(kernels, rows):
    given, dy = operands_of(case_of(BF16, (rows, 72, 64), 24, dropout_p=0.0))
    wild = [
        (-9, 2**31 - 1, 1.5),
        (20, 4, 1.0),
        (30, 40, 1.0),
        (-8, -2, 1.0),
        (-2, 8, 1.5),
        (-(2**31), 25, 1.5),
    ]
    tame = [(0, 24, 1.5), (0, 0, 1.0), (0, 0, 1.0), (0, 0, 1.0), (0, 8, 1.5), (0, 24, 1.5)]
    outcomes = [
        run(kernels, BF16, row_adapters([windows[i % 6] for i in range(rows)]), given, dy)
        for windows in (wild, tame)
    ]
    for name, tensor in outcomes[0].tensors.items():
        assert torch.equal(tensor, outcomes[1].tensors[name]), name


@pytest.mark.parametrize("kind", [BF16, MASTERS], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [40, 100])
def test_one_adapter_for_all_rows_is_the_call_without_adapters_bit_for_bit(kernels, kind, rows):
    given, dy = operands_of(case_of(kind, (rows, 72, 136), 24, dropout_p=0.0))
    machine = Machine("a100")
    forward = run_forward(kernels, machine, given, kind.mode)
    backward = run_backward(kernels, machine, dy, forward.h, given, kind.mode)
    mixed = run(kernels, kind, row_adapters([(0, 24, given.options["scaling"])] * rows), given, dy)
    assert torch.equal(mixed.forward.h, forward.h)
    for name, tensor in {"y": forward.y, **backward.gradients}.items():
        assert torch.equal(tensor, mixed.tensors[name]), name


@pytest.mark.parametrize("kind", [BF16, MASTERS], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [40, 140])
def test_a_row_gets_the_same_bits_whatever_rows_are_beside_it(kernels, kind, rows):
    batch = Batch(RANKS[:3], in_segments(rows, 3))
    given, dy = operands_of(case_of(kind, (rows, 72, 136), batch.rank, dropout_p=0.0))
    sorted_rows = run(kernels, kind, batch.row_adapters(), given, dy)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    shuffled = run(kernels, kind, batch.row_adapters()[order], replace(given, x=given.x[order]), dy[order])
    assert torch.equal(shuffled.forward.y, sorted_rows.forward.y[order])
    assert torch.equal(shuffled.forward.h, sorted_rows.forward.h[order])
    assert torch.equal(shuffled.backward.gradients["x"], sorted_rows.backward.gradients["x"][order])


# rows, ranks: few rows in one launch; by one read of dy; by two, several rank tiles; plain.
FAMILIES = {
    "few": (BF16, 20, (8, 17), "dense"),
    "few-masters": (MASTERS, 20, (8, 5), "dense"),
    "one-read": (BF16, 120, (8, 17), "dense"),
    "one-read-masters": (MASTERS, 120, (8, 5), "dense"),
    "two-reads": (BF16, 130, (8, 9, 60), "dense"),
    "two-reads-masters": (MASTERS, 130, (8, 9, 30), "dense"),
    "two-reads-tf32": (TF32, 130, (8, 9, 60), "dense"),
    "plain": (FP32, 40, (8, 17), "dense"),
    "plain-bf16": (BF16, 20, (3, 17), "unaligned"),
}


@pytest.mark.parametrize("only_b", [False, True], ids=["everything", "B alone"])
@pytest.mark.parametrize("name", FAMILIES)
def test_infinities_of_one_adapter_do_not_reach_another(kernels, name, only_b):
    """Adapter 0 has diverged: its A, B, rows of x and of dy. The others get what they get beside a sane one;
    its own results are finite just where PEFT's are."""
    kind, rows, ranks, layout = FAMILIES[name]
    batch = Batch(ranks, in_turn(rows, len(ranks)))
    begin, end = batch.window(0)
    sick = batch.rows_of(0)

    def spoil(given, dy):
        given.lora_b[7, end - 1] = float("-inf")
        given.lora_b[40, begin] = float("nan")
        if not only_b:
            given.lora_a[begin, 5] = float("inf")
            given.lora_a[begin + 1, 6] = float("nan")
            given.x[sick[0], 9] = float("inf")
            dy[sick[1], 11] = float("nan")

    options = {
        "layout": layout,
        "weight": "transposed" if only_b else "rows",
        "dropout_p": 0.0 if only_b or name.startswith("few") else 0.1,
    }
    sane = call(kernels, kind, batch, 72, 64, **options)
    assert (ONE_READ in sane.backward.run.description) == name.startswith(("few", "one-read"))
    assert ("plain" in sane.backward.run.description) == name.startswith("plain")
    ill = call(kernels, kind, batch, 72, 64, spoil=spoil, **options)
    healthy = torch.tensor([own != 0 for own in batch.rows])
    of_others = torch.ones(batch.rank, dtype=torch.bool)
    of_others[begin:end] = False
    for what, part in {
        "y": (healthy,),
        "x": (healthy,),
        "lora_a": (of_others,),
        "lora_b": (slice(None), of_others),
    }.items():
        ours, theirs = ill.tensors[what][part].double(), sane.tensors[what][part].double()
        # Summed without matrix units, in another order.
        assert (ours - theirs).norm() <= 2.0**-7 * theirs.norm(), what
    assert_zeros_elsewhere(batch, ill.forward.h)

    exact_y, exact = results_of(one_by_one(torch_sequence, batch), ill.given.double(), ill.dy.double())
    assert torch.equal(ill.forward.y.isfinite(), exact_y.isfinite())
    assert not exact_y[sick].isfinite().all()
    if not options["dropout_p"]:  # a reference that multiplies by the mask makes inf · 0 of what is dropped
        for what, gradient in ill.backward.gradients.items():
            assert torch.equal(gradient.isfinite(), exact[what].isfinite()), what


@pytest.mark.parametrize("name", ["two-reads", "two-reads-masters", "plain"])
def test_nor_where_x_is_a_shard(kernels, name):
    """Where a sum is formed again, its mask begins at the shard's column too."""
    kind, rows, ranks, layout = FAMILIES[name]
    batch = Batch(ranks, in_turn(rows, len(ranks)))
    sick = batch.rows_of(0)

    def shard(given, dy):
        given.options["column_offset"] = 40

    def spoil(given, dy):
        shard(given, dy)
        given.x[sick[0]] = float("inf")
        dy[sick[1], 11] = float("nan")

    sane = call(kernels, kind, batch, 72, 64, spoil=shard, layout=layout, dropout_p=0.5)
    ill = call(kernels, kind, batch, 72, 64, spoil=spoil, layout=layout, dropout_p=0.5)
    of_others = torch.ones(batch.rank, dtype=torch.bool)
    of_others[slice(*batch.window(0))] = False
    for what, part in {"lora_a": (of_others,), "lora_b": (slice(None), of_others)}.items():
        ours, theirs = ill.tensors[what][part].double(), sane.tensors[what][part].double()
        assert (ours - theirs).norm() <= 2.0**-7 * theirs.norm(), what


def segments_of_tiles(adapters: int, rows: int) -> list[int]:
    return [adapter for adapter in range(adapters) for _ in range(rows)]


def products(launch) -> int:
    return launch.total("executed", "mma")


@pytest.mark.parametrize("kind", [BF16, MASTERS, TF32], ids=lambda kind: kind.name)
def test_sorted_rows_cost_as_much_as_one_adapter_does(kernels, kind):
    """Four adapters of 32 ranks, 128 rows each, beside one adapter of 32 ranks for all of them."""
    ranks, rows, in_features, out_features = 32, 512, 192, 128
    batch = Batch((ranks,) * 4, segments_of_tiles(4, rows // 4))
    results = call(
        kernels, kind, batch, in_features, out_features, Machine("a100", check_races=False), dropout_p=0.0
    )
    given, dy = operands_of(case_of(kind, (rows, in_features, out_features), ranks, dropout_p=0.0))
    forward = run_forward(kernels, Machine("a100", check_races=False), given, kind.mode)
    backward = run_backward(kernels, Machine("a100", check_races=False), dy, forward.h, given, kind.mode)

    for mixed_run, alone in ((results.forward.run, forward.run), (results.backward.run, backward.run)):
        mixed, single = mixed_run.result.launches, alone.result.launches
        # lora-gemm: as many products, and as many bytes of the packed operands.
        assert products(mixed[1]) == products(single[1])
        assert mixed[1].buffers["workspace"].bytes_read == single[1].buffers["workspace"].bytes_read
    # rank-down: of A and B every tile of rows reads one adapter's part.
    element = given.lora_a.element_size()
    for launch, long, factor, extent in (
        (results.forward.run.result.launches[0], "x", "lora_a", in_features),
        (results.backward.run.result.launches[0], "dy", "lora_b", out_features),
    ):
        tiles = rows // 64
        assert launch.buffers[factor].unique_read == 4 * ranks * extent * element
        assert launch.buffers[factor].bytes_read <= max(tiles, 2 * rows // 64) * ranks * extent * element
        assert launch.buffers[long].bytes_read == launch.buffers[long].unique_read
    # rank-grad: a row is read for its own adapter's ranks alone, which are two tiles of 64.
    grad = results.backward.run.result.launches[2]
    assert (
        grad.buffers["x"].bytes_read
        == grad.buffers["x"].unique_read
        == given.x.numel() * given.x.element_size()
    )


def test_rows_in_turn_read_no_adapter_that_none_of_them_uses(kernels):
    batch = Batch((64,) * 4, [0, 3] * 40)
    results = call(kernels, BF16, batch, 96, 64, Machine("a100", check_races=False), dropout_p=0.0)
    down = results.forward.run.result.launches[0]
    assert down.buffers["lora_a"].unique_read == 2 * 64 * 96 * 2
    assert_as_alone(BF16, batch, results)


def test_few_sorted_rows_read_of_a_and_b_what_they_use(kernels):
    batch = Batch((16,) * 4, [0] * 16 + [1] * 16 + [3] * 32)
    results = call(kernels, BF16, batch, 256, 128, dropout_p=0.0)
    launch = results.forward.run.result.only
    lora_a, lora_b = launch.buffers["lora_a"], launch.buffers["lora_b"]
    blocks_of_columns = 128 // 64
    # The first 32 rows are one tile and use 32 ranks, the others 16.
    assert lora_a.bytes_read == blocks_of_columns * (32 + 16) * 256 * 2
    assert lora_a.unique_read == 48 * 256 * 2
    assert lora_b.bytes_read == (32 + 16) * 128 * 2


@pytest.mark.parametrize("rows", [20, 100])
def test_a_captured_graph_follows_the_windows_in_memory(kernels, rows):
    batch = Batch((8, 16), in_turn(rows, 2))
    given, dy = operands_of(case_of(BF16, (rows, 72, 64), batch.rank, dropout_p=0.0))
    direct = run(kernels, BF16, batch.row_adapters(), given, dy)
    captured = run(kernels, BF16, batch.row_adapters(), given, dy, run_on_stream=run_as_graph)
    for name, tensor in direct.tensors.items():
        assert torch.equal(tensor, captured.tensors[name]), name


def test_every_synchronisation_of_few_rows_is_needed(kernels):
    batch = Batch((16,), in_turn(5, 1))
    given, _ = operands_of(case_of(BF16, (5, 256, 64), 16, dropout_p=0.0))
    mode = Mode(row_adapters=batch.row_adapters())

    def launch(machine):
        return run_forward(kernels, machine, given, mode).run.result

    assert not unnoticed_mutants(launch)
