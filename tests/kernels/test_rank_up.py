"""Calls whose frozen product another computes, a quantised layer say: y is what that layer gave and the
low-rank product, dx the low-rank product alone. And gradients of x that are added to one that is there."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from fused_lora import reference
from tests.emulator import Machine
from tests.kernels.call import Mode, load, run_as_graph, run_backward, run_forward
from tests.kernels.cases import KINDS, case_of, laid_out, operands_of, results_of
from tests.kernels.test_row_adapters import Batch, in_turn
from tests.operands import BF16, F32, assert_no_worse_than_torch

BY_NAME = {kind.name: kind for kind in KINDS}
BY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
TF32_BOUND = 2.0**-10


class Case(NamedTuple):
    shape: tuple[int, int, int]  # M, K, N
    rank: int
    layout: str = "dense"  # of x and dy
    base: str = "dense"  # the layout of what the frozen layer gave
    dropout_p: float = 0.0


CASES = [
    Case((150, 144, 136), 24),
    Case((41, 72, 43), 5, base="padded", dropout_p=0.2),
    Case((33, 203, 113), 16, layout="unaligned", base="unaligned", dropout_p=0.1),
    Case((9, 64, 64), 40, base="padded"),
    Case((1, 8, 1), 1, layout="padded"),
]
BY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shape}-r{case.rank}-{case.layout}")


@pytest.fixture(scope="module")
def kernels():
    return load()


def added_to(base, rounds):
    """PEFT's sequence on a base that is no plain linear: what it gave, plus the adapter."""

    def sequence(x, weight, lora_a, lora_b, bias, *, scaling, dropout_p, seed=None):
        x_hat = x.to(lora_a.dtype)
        if dropout_p:
            mask = reference.dropout_mask(seed, *x.shape, dropout_p)
            x_hat = x_hat * (mask * reference.dropout_rule(dropout_p)[1]).to(x_hat.dtype)
        with torch.autocast("cpu", dtype=x.dtype if rounds else BF16, enabled=rounds):
            delta = F.linear(F.linear(x_hat, lora_a), lora_b) * scaling
        return (base.to(x.dtype) + delta).to(x.dtype)

    return sequence


def given_of(kind, case):
    """The operands, dy, and what the frozen layer gave, which a call in place overwrites."""
    options = {"layout": case.layout, "dropout_p": case.dropout_p, "bias": False}
    given, dy = operands_of(case_of(kind, case.shape, case.rank, **options))
    generator = torch.Generator().manual_seed(9)
    base = torch.randn(case.shape[0], case.shape[2], generator=generator).to(kind.dtype)
    return given, dy, lambda: laid_out(base, case.base)


def assert_as_exact(kind, given, dy, base, ours):
    """ours: of y and the gradients of x, those that there are."""
    (exact_y, exact), (own_y, own) = (
        results_of(added_to(base, rounds), *of)
        for rounds, *of in (
            (False, given.double(), dy.double()),
            (kind.mode.round_adapters, given, dy),
        )
    )
    for name, tensor in ours.items():
        right = exact_y if name == "y" else exact[name]
        if kind.mode.allow_tf32:
            assert (tensor.double() - right).norm() <= TF32_BOUND * right.norm(), name
        elif kind.has_masters and name in ("lora_a", "lora_b"):
            assert (tensor.double() - right).norm() <= 2.0**-18 * right.norm(), name
        else:
            assert_no_worse_than_torch(tensor, own_y if name == "y" else own[name], right, name)


def assert_clean(run, launches):
    assert len(run.result.assert_clean().launches) == run.planned_launches == launches
    assert "lora-gemm" not in run.description


@BY_CASE
@BY_KIND
def test_the_adapter_is_added_to_what_the_frozen_layer_gave(kernels, kind, case):
    """Beside it or in its place, to the same bits; no weight is passed."""
    given, dy, base = given_of(kind, case)
    machine = Machine(order="reverse")
    forward = run_forward(kernels, machine, given, kind.mode, base=base())
    assert_clean(forward.run, 2)
    assert_as_exact(kind, given, dy, base(), {"y": forward.y})
    in_place = run_forward(kernels, machine, given, kind.mode, base=base(), in_place=True)
    assert_clean(in_place.run, 2)
    assert in_place.y.stride() == base().stride()
    assert torch.equal(in_place.y, forward.y)
    assert torch.equal(in_place.h, forward.h)


@BY_CASE
@BY_KIND
def test_without_a_frozen_product_dx_is_the_adapters_alone(kernels, kind, case):
    given, dy, base = given_of(kind, case)
    machine = Machine(order="random", seed=3)
    h = run_forward(kernels, machine, given, kind.mode, base=base()).h
    backward = run_backward(kernels, machine, dy, h, given, kind.mode, frozen=False)
    launches = backward.run.planned_launches
    assert launches <= 4
    assert_clean(backward.run, launches)
    if case.shape[0] > 1:
        assert_as_exact(kind, given, dy, base(), backward.gradients)
    else:
        assert_as_exact(kind, given, dy, base(), {"x": backward.gradients["x"]})


@pytest.mark.parametrize("case", CASES[1:3], ids=["aligned", "plain"])
@BY_KIND
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "adapter alone"])
def test_dx_is_added_to_a_gradient_that_is_there(kernels, kind, frozen, case):
    given, dy, _ = given_of(kind, case)
    machine = Machine()
    options = {"needs": ("x",), "frozen": frozen}
    there = torch.randn(given.x.shape, generator=torch.Generator().manual_seed(8)).to(kind.dtype)
    alone = run_backward(kernels, machine, dy, dy, given, kind.mode, **options)
    added = run_backward(kernels, machine, dy, dy, given, kind.mode, **options, adds_to=there)
    assert len(added.run.result.assert_clean().launches) == added.run.planned_launches == 2
    assert added.run.description == alone.run.description
    dx = alone.gradients["x"].double()
    right = dx + there.double()
    rounding = torch.finfo(kind.dtype).eps / 2
    bound = rounding * (dx.abs() + right.abs()) + 2.0**-20 * (dx.abs() + there.double().abs())
    assert ((added.gradients["x"].double() - right).abs() <= bound).all()


@pytest.mark.parametrize("layout", ["dense", "unaligned"])
def test_a_sum_of_all_parts_is_rounded_once(kernels, layout):
    """Parts that bf16 would lose one by one beside 256: only their sum, in fp32, reaches the next number."""
    kind = BY_NAME["bf16"]
    given, dy = operands_of(case_of(kind, (20, 64, 48), 8, layout=layout, bias=False, dropout_p=0.0))
    for matrix in (given.weight, given.lora_a, given.lora_b, dy):
        matrix.zero_()
    given.options["scaling"] = 1.0
    dy[:, 0] = 1.0
    given.weight[0] = 0.75
    given.lora_b[0, 0] = 1.0
    given.lora_a[0] = 0.5
    there = torch.full(given.x.shape, 256.0, dtype=kind.dtype)
    backward = run_backward(kernels, Machine(), dy, dy, given, kind.mode, ("x",), adds_to=there)
    assert (backward.gradients["x"] == 258).all()  # 257.25; neither 256.75 nor 256.5 would have moved it


@pytest.mark.parametrize("name", ["bf16", "bf16-masters", "tf32", "fp32"])
def test_rows_of_several_adapters_are_served_in_one_batch(kernels, name):
    kind = BY_NAME[name]
    batch = Batch((8, 16, 3), in_turn(70, 3))
    given, dy, base = given_of(kind, Case((70, 72, 40), batch.rank, base="padded"))
    mode = replace(kind.mode, row_adapters=batch.row_adapters())
    forward = run_forward(kernels, Machine(), given, mode, base=base(), in_place=True)
    assert_clean(forward.run, 2)
    delta = forward.h.double() @ given.lora_b.double().t()
    right = base().double() + delta
    relative = TF32_BOUND if kind.mode.allow_tf32 else 2 * torch.finfo(kind.dtype).eps
    assert ((forward.y.double() - right).abs() <= relative * (right.abs() + 4)).all()
    without = torch.tensor([adapter == -1 for adapter in batch.rows])
    assert torch.equal(forward.y[without], base()[without])
    backward = run_backward(kernels, Machine(), dy, forward.h, given, mode, frozen=False)
    backward.run.result.assert_clean()
    assert not backward.gradients["x"][without].any()
    assert backward.gradients["x"][~without].any(dim=1).all()


@BY_KIND
def test_no_rows_launch_nothing(kernels, kind):
    given, dy, base = given_of(kind, Case((0, 64, 48), 8))
    forward = run_forward(kernels, Machine(), given, kind.mode, base=base())
    assert not forward.run.result.launches
    there = torch.empty(0, 64, dtype=kind.dtype)
    backward = run_backward(kernels, Machine(), dy, forward.h, given, kind.mode, frozen=False, adds_to=there)
    backward.run.result.assert_clean()
    assert not backward.gradients["lora_a"].any()


def test_what_is_dropped_may_be_infinite(kernels):
    kind = BY_NAME["bf16"]
    given, dy, base = given_of(kind, Case((40, 144, 72), 24, dropout_p=0.5))
    mask = reference.dropout_mask(given.options["seed"], *given.x.shape, 0.5)
    given.x[~mask] = float("inf")
    forward = run_forward(kernels, Machine(), given, kind.mode, base=base())
    backward = run_backward(kernels, Machine(), dy, forward.h, given, kind.mode, frozen=False)
    assert forward.y.isfinite().all()
    assert not backward.gradients["x"][~mask].any()
    assert all(gradient.isfinite().all() for gradient in backward.gradients.values())


def test_a_captured_graph_computes_the_same(kernels):
    kind = BY_NAME["bf16-autocast"]
    given, dy, base = given_of(kind, CASES[1])
    direct = run_forward(kernels, Machine(), given, kind.mode, base=base())
    captured = run_forward(kernels, Machine(), given, kind.mode, run_as_graph, base=base(), in_place=True)
    assert torch.equal(direct.y, captured.y)
    there = torch.ones(given.x.shape, dtype=kind.dtype)
    gradients = [
        run_backward(kernels, Machine(), dy, direct.h, given, kind.mode, run_on_stream=run, adds_to=there)
        for run in (run_as_graph, lambda launch, arguments: launch(*arguments, None))
    ]
    assert torch.equal(gradients[0].gradients["x"], gradients[1].gradients["x"])


@pytest.mark.parametrize(
    ("name", "rank", "dropout_p"),
    [
        ("bf16", 16, 0.1),
        ("fp16-autocast", 40, 0.0),
        ("bf16-masters", 16, 0.1),
        ("tf32", 24, 0.0),
        ("fp32", 8, 0),
    ],
)
@pytest.mark.parametrize("rows", [8, 512])
def test_what_moves_is_one_read_of_x_and_one_read_and_write_of_y(kernels, name, rank, dropout_p, rows):
    """Forward. Backward: dy for g and, where one read does not serve, for dB, x for dA, and dx written."""
    kind = BY_NAME[name]
    m, k, n = shape = (rows, 192, 128)
    given, dy, base = given_of(kind, Case(shape, rank, dropout_p=dropout_p))
    machine = Machine(check_races=False)
    forward = run_forward(kernels, machine, given, kind.mode, base=base(), in_place=True)
    x, y = m * k * kind.dtype.itemsize, m * n * kind.dtype.itemsize
    down, up = forward.run.result.launches
    assert long_bytes(down) == {"x": (x, 0)}
    assert long_bytes(up) == {"y": (y, y)}
    assert up.buffers["y"].bytes_read == up.buffers["y"].bytes_written == y
    if name != "fp32":
        assert up.total("sectors") == up.total("ideal_sectors") > 0
    apart = run_forward(kernels, machine, given, kind.mode, base=base())
    assert long_bytes(apart.run.result.launches[1]) == {"base": (y, 0), "y": (0, y)}

    backward = run_backward(kernels, machine, dy, forward.h, given, kind.mode, frozen=False)
    one_read = "one read of dy" in backward.run.description
    down, up, grad, *rest = backward.run.result.launches
    assert long_bytes(down) == {"dy": (y, 0)}
    assert long_bytes(up) == {"dx": (0, x)}
    assert long_bytes(grad) == {"x": (x, 0)} | ({} if one_read else {"dy": (y, 0)})
    assert all(not long_bytes(launch) for launch in rest)


def long_bytes(launch):
    """{buffer: (bytes read, bytes written)} of the long operands, each byte once."""
    return {
        name: (traffic.unique_read, traffic.unique_written)
        for name, traffic in launch.buffers.items()
        if name in ("x", "y", "dy", "dx", "base", "weight") and traffic.unique_read + traffic.unique_written
    }


def test_plans_say_what_serves(kernels):
    for kind, word in ((BY_NAME["bf16"], "tensor cores"), (BY_NAME["fp32"], "plain, because")):
        given, dy, base = given_of(kind, CASES[0])
        forward = run_forward(kernels, Machine(), given, kind.mode, base=base())
        backward = run_backward(kernels, Machine(), dy, forward.h, given, kind.mode, frozen=False)
        for run in (forward.run, backward.run):
            assert f"rank-up: {word}" in run.description


def test_masters_keep_their_precision_in_what_is_added(kernels):
    """A 16-bit y of small numbers on top of nothing: the low-rank path's own precision shows."""
    kind = BY_NAME["fp16-masters"]
    given, _, base = given_of(kind, Case((40, 144, 72), 24))
    forward = run_forward(kernels, Machine(), given, Mode(), base=torch.zeros_like(base()))
    exact = (
        given.x.double() @ given.lora_a.double().t() @ given.lora_b.double().t() * given.options["scaling"]
    )
    assert forward.h.dtype == F32
    bound = torch.finfo(kind.dtype).eps / 2 * exact.abs() + 2.0**-15
    assert ((forward.y.double() - exact).abs() <= bound).all()
