"""The device of the operands and the stream that is current decide where a call runs."""

from __future__ import annotations

import pytest
import torch

from fused_lora import LoRALinear, dropout_mask, lora_linear
from tests.operands import BF16, F32, check_against_torch, forward_and_backward, operands

LONG = 200_000_000  # cycles: a tenth of a second, time enough for a launch on the wrong stream to come first


@pytest.fixture
def second(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    return torch.device("cuda", 1)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_device_that_is_not_current(second, path, dtype):
    """Allocations, launches and stream belong to the operands' device, and the current one stays."""
    with torch.cuda.device(0):
        check_against_torch(operands((70,), 64, 96, 8, dtype, dropout_p=0.3).to(second), lora_linear)
        seed = torch.tensor([3])
        assert torch.equal(dropout_mask(seed.to(second), 20, 40, 0.5).cpu(), dropout_mask(seed, 20, 40, 0.5))
        assert torch.cuda.current_device() == 0


def test_operands_of_two_devices_are_refused(second, path):
    given = operands((4,)).to("cuda:0")
    given.lora_a = given.lora_a.to(second)
    with pytest.raises((ValueError, RuntimeError), match="lora_a"):
        lora_linear(*given.tensors, **given.options)


def test_a_tensor_on_the_cpu_among_them_is_refused(cuda, path):
    given = operands((4,)).to(cuda)
    given.lora_b = given.lora_b.cpu()
    with pytest.raises((ValueError, RuntimeError), match="lora_b"):
        lora_linear(*given.tensors, **given.options)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_side_stream(cuda, path, dtype):
    """x is written late, on the stream that the call is on: only work of that stream sees it."""
    given = operands((300,), 256, 128, 16, dtype, dropout_p=0.1).to(cuda)
    expected = forward_and_backward(lora_linear, given)
    late = given.x
    given.x = torch.zeros_like(late)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        given.x.copy_(late)
        got = forward_and_backward(lora_linear, given)
    stream.synchronize()
    assert torch.equal(got[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(got[1][name], gradient), name


def test_the_mask_on_a_side_stream(cuda):
    seed = torch.zeros(1, dtype=torch.int64, device=cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        seed.fill_(77)
        mask = dropout_mask(seed, 30, 50, 0.5)
    stream.synchronize()
    assert torch.equal(mask.cpu(), dropout_mask(77, 30, 50, 0.5))


def test_nothing_synchronises(cuda, path):
    layer = LoRALinear(256, 128, r=8, dropout=0.1).to(cuda, BF16)
    x = torch.randn(64, 256, device=cuda, dtype=BF16, requires_grad=True)
    layer(x).sum().backward()  # whatever is done once
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
