"""The kernels end to end: forward and backward against float64, by the rule of tests/operands.py, under every
check of the emulator."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_lora import reference
from tests.emulator import Machine
from tests.kernels.call import GRADIENTS, load, run_backward, run_forward
from tests.kernels.cases import (
    CASES,
    FACTORS,
    KINDS,
    case_of,
    exact_results,
    name_of,
    operands_of,
    torch_results,
)
from tests.operands import assert_no_worse_than_torch
from tests.operands import forward_and_backward as of_op

# Beside fp32 masters a 16-bit operand is multiplied with two tf32 pieces of an fp32 one: of the sum of the
# magnitudes this much is lost, the sum in fp32 included, where fp32 arithmetic loses less still.
MASTERS_BOUND = 2.0**-20


@pytest.fixture(scope="module")
def kernels():
    return load()


def machine_of(case, **options):
    return Machine(order=case["order"], seed=case["rank"], **options)


def forward_and_backward(kernels, machine, case):
    given, dy = operands_of(case)
    mode = case["kind"].mode
    forward = run_forward(kernels, machine, given, mode)
    backward = run_backward(kernels, machine, dy, forward.h, given, mode)
    return given, dy, forward, backward


def magnitudes(given, dy):
    """Sums of the magnitudes that dA and dB add up, in float64."""
    x, _, lora_a, lora_b, _ = (None if t is None else t.double().abs() for t in given.tensors)
    scaling, p = given.options["scaling"], given.options["dropout_p"]
    if p:
        x = x * reference.dropout_mask(given.options["seed"], *x.shape, p) * reference.dropout_rule(p)[1]
    dy = scaling * dy.double().abs()
    return {"lora_a": (dy @ lora_b).t() @ x, "lora_b": dy.t() @ (x @ lora_a.t())}


def assert_within(bound, ours, exact, magnitude, name):
    excess = (ours.double() - exact).abs() - bound * magnitude
    assert excess.max() <= 0, f"gradient of {name}: {excess.max():.3g} beyond the bound"


def assert_right(kind, given, dy, y, gradients):
    own_y, own = torch_results(kind, given, dy)
    exact_y, exact = exact_results(given, dy)
    assert_no_worse_than_torch(y, own_y, exact_y, "y")
    for name, ours in gradients.items():
        if kind.has_masters and name != "x":
            assert ours.dtype == torch.float32
            assert_within(MASTERS_BOUND, ours, exact[name], magnitudes(given, dy)[name], name)
        elif len(dy) == 1 and name != "x":
            # All errors are then those of the r numbers of h or g: to compare them is to compare luck.
            bound = torch.finfo(dy.dtype).eps if not kind.mode.allow_tf32 else 2.0**-10
            assert_within(2 * bound, ours, exact[name], magnitudes(given, dy)[name], name)
        else:
            assert_no_worse_than_torch(ours, own[name], exact[name], f"gradient of {name}")


def test_the_cases_cover_every_pair_of_values():
    for one, other in itertools.combinations(FACTORS, 2):
        covered = {(case[one], case[other]) for case in CASES}
        assert covered >= set(itertools.product(FACTORS[one], FACTORS[other]))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_as_exact_as_torch_and_clean(kernels, case):
    machine = machine_of(case, check_races=case["shape"][0] < 100)
    given, dy, forward, backward = forward_and_backward(kernels, machine, case)
    for run, most in ((forward.run, 2), (backward.run, 4)):
        run.result.assert_clean()
        assert len(run.result.launches) == run.planned_launches <= most, run.description
    assert_right(case["kind"], given, dy, forward.y, backward.gradients)


def on_tensor_cores(case):
    return case["kind"].name != "fp32" and case["layout"] in ("dense", "padded") and case["shape"][1] % 8 == 0


@pytest.mark.parametrize(
    "case", [case for case in CASES if on_tensor_cores(case) and case["shape"][0] == 16], ids=name_of
)
def test_tensor_cores_that_truncate_as_hardware_does_keep_the_rule(kernels, case):
    machine = machine_of(case, truncating=True, check_races=False)
    given, dy, forward, backward = forward_and_backward(kernels, machine, case)
    assert_right(case["kind"], given, dy, forward.y, backward.gradients)


BY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@BY_KIND
@pytest.mark.parametrize("layout", ["dense", "unaligned"])
def test_results_do_not_depend_on_the_order_of_blocks(kernels, kind, layout):
    def results(order):
        case = case_of(kind, (150, 144, 136), 24, layout=layout, order=order)
        _, _, forward, backward = forward_and_backward(kernels, machine_of(case, check_races=False), case)
        return [forward.y, forward.h, *backward.gradients.values()]

    first = results("forward")
    for order in ("reverse", "random"):
        assert all(torch.equal(a, b) for a, b in zip(first, results(order), strict=True))


SUBSETS = [s for n in (1, 2) for s in itertools.combinations(GRADIENTS, n)]


@pytest.mark.parametrize("needs", SUBSETS, ids="-".join)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[6]], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rank", [8, 48])
def test_only_what_is_needed_is_computed(kernels, kind, needs, rank):
    """What none of the asked gradients needs is not passed, so that reading it would be found, and costs no
    launch."""
    machine = Machine()
    case = case_of(kind, (40, 144, 72), rank)
    given, dy, forward, whole = forward_and_backward(kernels, machine, case)
    part = run_backward(kernels, machine, dy, forward.h, given, kind.mode, needs)
    part.run.result.assert_clean()
    assert part.gradients.keys() == set(needs)
    for name, gradient in part.gradients.items():
        assert torch.allclose(gradient.double(), whole.gradients[name].double(), rtol=1e-2, atol=1e-3)
    _, own = torch_results(kind, given, dy)
    _, exact = exact_results(given, dy)
    for name, gradient in part.gradients.items():
        if not kind.has_masters:
            assert_no_worse_than_torch(gradient, own[name], exact[name], f"gradient of {name}")
    launches = len(part.run.result.launches)
    assert launches == part.run.planned_launches
    assert launches <= len(whole.run.result.launches)
    if needs == ("lora_b",):
        assert launches <= 2
    if needs == ("x",):
        assert launches == 2


@BY_KIND
def test_no_rows_give_zero_gradients(kernels, kind):
    machine = Machine()
    case = case_of(kind, (0, 64, 48), 24)
    _, _, forward, backward = forward_and_backward(kernels, machine, case)
    assert not forward.run.result.launches
    assert forward.y.shape == (0, 48)
    backward.run.result.assert_clean()
    assert len(backward.run.result.launches) == backward.run.planned_launches <= 4
    assert backward.gradients["x"].shape == (0, 64)
    for name in ("lora_a", "lora_b"):
        assert torch.equal(backward.gradients[name], torch.zeros_like(backward.gradients[name]))


@BY_KIND
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 8), (5, 8, 1), (1, 16, 1)])
def test_single_rows_and_columns(kernels, kind, shape):
    case = case_of(kind, shape, 1, order="reverse")
    given, dy, forward, backward = forward_and_backward(kernels, machine_of(case), case)
    forward.run.result.assert_clean()
    backward.run.result.assert_clean()
    own_y, own = torch_results(kind, given, dy)
    exact_y, exact = exact_results(given, dy)
    for ours, theirs, right in (
        (forward.y, own_y, exact_y),
        *zip(backward.gradients.values(), own.values(), exact.values(), strict=True),
    ):
        # One product of few terms may be exact in torch by chance: a unit in the last place is granted.
        assert ours.dtype == theirs.dtype
        unit = torch.finfo(kind.dtype).eps if not kind.mode.allow_tf32 else 2.0**-10
        assert ((ours.double() - right).abs() <= 8 * unit * right.abs().clamp(min=0.5)).all()


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_what_is_dropped_may_be_infinite(kernels, p):
    """Dropped elements are replaced and not multiplied by zero, and with p = 1 nothing is kept."""
    kind = KINDS[0]
    case = case_of(kind, (40, 144, 72), 24, dropout_p=p)
    given, dy = operands_of(case)
    mask = reference.dropout_mask(given.options["seed"], *given.x.shape, p)
    given.x[~mask] = float("inf")
    forward = run_forward(kernels, Machine(), given, kind.mode)
    backward = run_backward(kernels, Machine(), dy, forward.h, given, kind.mode)
    assert forward.h.isfinite().all()
    for name in GRADIENTS:
        assert backward.gradients[name].isfinite().all(), name
    if p == 1.0:
        assert not forward.h.any()
        assert not backward.gradients["lora_a"].any()


@pytest.mark.parametrize("layout", ["dense", "unaligned"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[7]], ids=lambda kind: kind.name)
def test_a_shard_drops_its_columns_of_the_whole_mask(kernels, kind, layout):
    case = case_of(kind, (40, 144, 72), 24, dropout_p=0.5, layout=layout)
    given, dy = operands_of(case)
    given.options["column_offset"] = 40
    forward = run_forward(kernels, Machine(), given, kind.mode)
    backward = run_backward(kernels, Machine(), dy, forward.h, given, kind.mode)
    y, right = of_op(reference.lora_linear, given.double(), GRADIENTS, dy.double())
    for ours, exact in ((forward.y, y), *((backward.gradients[name], right[name]) for name in GRADIENTS)):
        assert (ours.double() - exact).norm() < 0.01 * exact.norm()


def test_plans_say_which_kernels_serve_and_why_plain_ones_do(kernels):
    machine = Machine()
    case = case_of(KINDS[0], (80, 144, 72), 24)
    _, _, forward, backward = forward_and_backward(kernels, machine, case)
    for run in (forward.run, backward.run):
        assert "lora-gemm: tensor cores" in run.description
        assert "plain" not in run.description
    case = case_of(KINDS[0], (80, 144, 72), 24, layout="unaligned")
    _, _, forward, backward = forward_and_backward(kernels, machine, case)
    for run in (forward.run, backward.run):
        assert "because the rows of x (or dy) do not begin at multiples of 16 bytes" in run.description
