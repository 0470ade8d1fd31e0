"""CUDA graphs: a captured call replays on new inputs, with new masks."""

from __future__ import annotations

import pytest
import torch

from fused_lora import LoRALinear, dropout_mask, lora_linear
from tests.operands import BF16, F32, operands


def captured(call):
    """(graph, the call's result inside of it), after what is done only once was done."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(BF16, BF16), (BF16, F32), (F32, F32)])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_forward_and_backward_with_changing_inputs_and_seeds(cuda, path, dtype, adapter_dtype, rows):
    given = operands((rows,), 256, 128, 16, dtype, adapter_dtype, dropout_p=0.3).to(cuda)
    leaves = [given.x, given.lora_a, given.lora_b]
    for leaf in leaves:
        leaf.requires_grad_()
    dy = torch.randn(rows, 128, device=cuda, dtype=dtype)

    def call():
        y = lora_linear(*given.tensors, **given.options)
        return y, *torch.autograd.grad(y, leaves, dy)

    graph, results = captured(call)
    for seed in (1, 2):
        with torch.no_grad():
            given.x.copy_(torch.randn_like(given.x))
            given.options["seed"].fill_(seed)
        graph.replay()
        for name, got, expected in zip(("y", "dx", "dA", "dB"), results, call(), strict=True):
            assert torch.equal(got, expected), (seed, name)


def test_each_replay_draws_another_mask(cuda, path):
    """The seed is drawn by torch's generator on the device, which graphs advance."""
    layer = LoRALinear(64, 32, r=4, dropout=0.5).to(cuda)
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(8, 64, device=cuda)
    graph, y = captured(lambda: layer(x))
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(y.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_the_mask_is_captured(cuda):
    seed = torch.tensor([1], device=cuda)
    graph, mask = captured(lambda: dropout_mask(seed, 20, 40, 0.5))
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(mask.cpu(), dropout_mask(value, 20, 40, 0.5))


def test_auto_times_nothing_during_capture(cuda, tmp_path):
    """A class of shapes that is met first in a capture: timing would synchronise, and break it."""
    given = operands((24,), 320, 192, 5, BF16).to(cuda)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = lora_linear(*given.tensors, **given.options)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, lora_linear(*given.tensors, **given.options))
