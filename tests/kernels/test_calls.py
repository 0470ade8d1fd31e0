"""What a whole call promises beside its results: it can be captured, and takes any rank."""

from __future__ import annotations

import pytest
import torch

from tests.emulator import Machine
from tests.kernels.call import Mode, load, run_as_graph, run_backward, run_forward
from tests.operands import BF16, F32, forward_and_backward, operands, torch_sequence


@pytest.fixture(scope="module")
def kernels():
    return load()


@pytest.mark.parametrize("rows", [9, 70])
def test_a_captured_graph_computes_the_same(kernels, rows):
    """Nothing in a call synchronises or allocates, which the strictest capture would refuse."""
    given = operands((rows,), 72, 64, 8, BF16, dropout_p=0.0 if rows == 9 else 0.2)
    dy = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    machine = Machine("a100")
    direct = run_forward(kernels, machine, given, Mode())
    captured = run_forward(kernels, machine, given, Mode(), run_as_graph)
    assert torch.equal(direct.y, captured.y)
    assert torch.equal(direct.h, captured.h)
    backward = run_backward(kernels, machine, dy, direct.h, given, Mode())
    replayed = run_backward(kernels, machine, dy, direct.h, given, Mode(), run_on_stream=run_as_graph)
    for name, gradient in backward.gradients.items():
        assert torch.equal(gradient, replayed.gradients[name]), name
    for run in (captured.run, replayed.run):
        assert len(run.result.assert_clean().launches) == run.planned_launches


@pytest.mark.parametrize("rank", [300, 513])
def test_ranks_beyond_256(kernels, rank):
    given = operands((20,), 64, 72, rank, BF16, F32)
    dy = torch.randn(20, 72, generator=torch.Generator().manual_seed(1)).to(BF16)
    machine = Machine("a100")
    forward = run_forward(kernels, machine, given, Mode(round_adapters=True))
    backward = run_backward(kernels, machine, dy, forward.h, given, Mode(round_adapters=True))
    forward.run.result.assert_clean()
    backward.run.result.assert_clean()
    y, gradients = forward_and_backward(torch_sequence, given.double(), dy=dy)
    torch.testing.assert_close(forward.y.double(), y, rtol=0.02, atol=0.02 * float(y.abs().max()))
    for name, gradient in backward.gradients.items():
        exact = gradients[name]
        assert (gradient.double() - exact).norm() / exact.norm() < 0.01, name
