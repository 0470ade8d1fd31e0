"""Projections of one x in one group of calls: each as by itself, x read once for all h and once for all dA,
and one dx to which each adds its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.emulator import Machine
from tests.kernels.call import load, run_as_graph, run_backward, run_forward
from tests.kernels.cases import KINDS
from tests.kernels.group import group_of, run_backward_group, run_forward_group

BY_NAME = {kind.name: kind for kind in KINDS}
BY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
# (out_features, rank) of each.
QKV = ((136, 16), (72, 5), (40, 24))
GATE_UP = ((88, 8), (88, 8))
SEVEN = tuple((24 + 8 * i, 1 + 3 * i) for i in range(7))


@pytest.fixture(scope="module")
def kernels():
    return load()


def assert_close(ours, alone, dtype):
    """Sums in another order: of as many shares as suit all, and of the parts of dx."""
    allowed = max(4 * torch.finfo(dtype).eps, 2.0**-19) * alone.double().abs().max()
    error = (ours.double() - alone.double()).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_as_alone(kernels, kind, group, forward, backward):
    """y, h and dB to the same bits; dA and dx but for the order of their sums."""
    dx = torch.zeros(group.x.shape, dtype=torch.float64)
    for i, member in enumerate(group.members):
        alone = run_forward(kernels, Machine("a100", check_races=False), member, kind.mode)
        assert torch.equal(forward.ys[i], alone.y), i
        assert torch.equal(forward.hs[i], alone.h), i
        machine = Machine("a100", check_races=False)
        own = run_backward(kernels, machine, group.dys[i], alone.h, member, kind.mode)
        assert torch.equal(backward.gradients[i]["lora_b"], own.gradients["lora_b"]), i
        assert_close(backward.gradients[i]["lora_a"], own.gradients["lora_a"], kind.adapters)
        dx += own.gradients["x"].double()
    assert_close(backward.dx, dx, kind.dtype)


def run_both(kernels, kind, group, machine=None, **options):
    machine = machine or Machine("a100")
    forward = run_forward_group(kernels, machine, group, kind.mode, **options)
    backward = run_backward_group(kernels, machine, group, forward.hs, kind.mode, **options)
    for run in (forward.run, backward.run):
        assert len(run.result.assert_clean().launches) == run.planned_launches, run.description
    return forward, backward


@BY_KIND
@pytest.mark.parametrize(
    ("sizes", "rows", "layout", "dropout_p"),
    [(QKV, 150, "dense", 0.0), (QKV, 70, "padded", 0.3), (GATE_UP, 33, "unaligned", 0.1)],
    ids=["qkv", "qkv-dropout", "gate-up-plain"],
)
def test_each_projection_is_computed_as_by_itself(kernels, kind, sizes, rows, layout, dropout_p):
    group = group_of(kind, rows, 104, sizes, dropout_p, layout)
    forward, backward = run_both(kernels, kind, group, Machine("a100", order="random", seed=rows))
    assert_as_alone(kernels, kind, group, forward, backward)


@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_more_projections_than_a_launch_takes(kernels, name):
    """Seven: two launches for h, and for the gradients, as four take one."""
    kind = BY_NAME[name]
    group = group_of(kind, 70, 72, SEVEN, 0.2)
    forward, backward = run_both(kernels, kind, group)
    assert forward.run.planned_launches == 2 + 7
    assert_as_alone(kernels, kind, group, forward, backward)


def test_few_rows_take_one_launch_each(kernels):
    kind = BY_NAME["bf16"]
    group = group_of(kind, 9, 104, QKV)
    forward, backward = run_both(kernels, kind, group)
    assert forward.run.planned_launches == 3
    assert forward.run.description.count("few rows in one launch") == 3
    assert_as_alone(kernels, kind, group, forward, backward)


def test_factors_of_any_layout_share_a_launch(kernels):
    """A stored by its ranks, and one whose rows are no chunks, beside a plain one."""
    kind = BY_NAME["bf16-masters"]
    group = group_of(kind, 70, 104, QKV, 0.1)
    members = list(group.members)
    members[0] = replace(members[0], lora_a=members[0].lora_a.t().contiguous().t())
    shifted = torch.empty(5, 105)[:, 1:]
    members[1] = replace(members[1], lora_a=shifted.copy_(members[1].lora_a))
    group = replace(group, members=members)
    forward, backward = run_both(kernels, kind, group)
    assert forward.run.planned_launches == 1 + 3
    assert_as_alone(kernels, kind, group, forward, backward)


def test_all_factors_stored_by_their_ranks_share_a_launch(kernels):
    kind = BY_NAME["bf16"]
    group = group_of(kind, 70, 104, GATE_UP)
    members = [replace(m, lora_a=m.lora_a.t().contiguous().t()) for m in group.members]
    group = replace(group, members=members)
    forward, backward = run_both(kernels, kind, group)
    assert_as_alone(kernels, kind, group, forward, backward)


@pytest.mark.parametrize("needs", [("x",), ("lora_a",), ("lora_b",), ("lora_a", "lora_b")], ids="-".join)
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_only_what_is_needed_is_computed(kernels, name, needs):
    kind = BY_NAME[name]
    group = group_of(kind, 40, 72, QKV, 0.1)
    forward, whole = run_both(kernels, kind, group)
    part = run_backward_group(kernels, Machine("a100"), group, forward.hs, kind.mode, needs)
    assert len(part.run.result.assert_clean().launches) == part.run.planned_launches
    if "x" in needs:
        assert torch.equal(part.dx, whole.dx)
    for own, all_of_it in zip(part.gradients, whole.gradients, strict=True):
        for gradient in needs:
            if gradient != "x":
                assert_close(own[gradient], all_of_it[gradient], kind.adapters)


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_results_do_not_depend_on_the_order_of_blocks(kernels, order):
    kind = BY_NAME["bf16"]
    group = group_of(kind, 150, 104, QKV, 0.2)
    first, other = (
        run_both(kernels, kind, group, Machine("a100", order=o, seed=1, check_races=False))
        for o in ("forward", order)
    )
    for ours, theirs in zip(first[0].ys + first[0].hs, other[0].ys + other[0].hs, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first[1].dx, other[1].dx)
    for ours, theirs in zip(first[1].gradients, other[1].gradients, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_captured_graph_computes_the_same(kernels):
    kind = BY_NAME["bf16-autocast"]
    group = group_of(kind, 40, 72, QKV, 0.2)
    direct, captured = (
        run_both(kernels, kind, group, **options) for options in ({}, {"run_on_stream": run_as_graph})
    )
    assert all(torch.equal(a, b) for a, b in zip(direct[0].ys, captured[0].ys, strict=True))
    assert torch.equal(direct[1].dx, captured[1].dx)


@BY_KIND
def test_no_rows_give_zero_gradients(kernels, kind):
    group = group_of(kind, 0, 64, GATE_UP)
    forward, backward = run_both(kernels, kind, group)
    assert not forward.run.result.launches
    for gradients in backward.gradients:
        assert all(not gradient.any() for gradient in gradients.values())


def moved(launch, *names):
    """{buffer: (bytes read, bytes written)} of the long operands, each byte once."""
    return {
        name: (traffic.unique_read, traffic.unique_written)
        for name, traffic in launch.buffers.items()
        if name.rstrip("0123456789") in names and traffic.unique_read + traffic.unique_written
    }


@pytest.mark.parametrize("name", ["bf16", "bf16-masters", "tf32"])
def test_x_is_read_once_for_all_h_and_once_for_all_da(kernels, name):
    kind = BY_NAME[name]
    rows, k, sizes = 512, 192, ((128, 16), (64, 16), (64, 8))
    group = group_of(kind, rows, k, sizes, 0.1)
    machine = Machine("a100", check_races=False)
    forward, backward = run_both(kernels, kind, group, machine)
    size = kind.dtype.itemsize
    x, ys = rows * k * size, [rows * n * size for n, _ in sizes]

    down, *gemms = forward.run.result.launches
    assert moved(down, "x", "y", "weight") == {"x": (x, 0)}
    assert len(gemms) == 3
    for i, gemm in enumerate(gemms):
        assert moved(gemm, "x", "y") == {"x": (x, 0), f"y{i}": (0, ys[i])}

    *of_dy, grad, _sums = backward.run.result.launches
    assert len(of_dy) == 2 * 3
    for i in range(3):
        g, gemm = of_dy[2 * i : 2 * i + 2]
        assert moved(g, "x", "dy", "dx") == {f"dy{i}": (ys[i], 0)}
        dx = (x if i else 0, x)  # those after the first add to what is there
        assert moved(gemm, "x", "dy", "dx") == {f"dy{i}": (ys[i], 0), "dx": dx}
    assert moved(grad, "x", "dx") == {"x": (x, 0)}
    # A warp's requests are as whole as those of a call by itself.
    assert down.total("sectors", "cp.async") == down.total("ideal_sectors", "cp.async") > 0
