"""Autocast, torch.compile, checkpointing, opcheck, and what is kept in memory, on the GPU."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora import LoRALinear, lora_linear
from tests.operands import BF16, F16, F32, check_against_torch, forward_and_backward, operands
from tests.test_autocast import peft_sequence
from tests.test_saved_memory import own_bytes, saved_tensors


@pytest.mark.parametrize("autocast_dtype", [BF16, F16])
@pytest.mark.parametrize("base_dtype", [F32, "autocast"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_as_exact_as_peft_under_autocast(device, path, autocast_dtype, base_dtype, dropout_p):
    def under_autocast(op):
        def call(*args, **kwargs):
            with torch.autocast(device.type, dtype=autocast_dtype):
                return op(*args, **kwargs)

        return call

    base = autocast_dtype if base_dtype == "autocast" else base_dtype
    given = operands((65,), 136, 72, 8, base, F32, dropout_p=dropout_p).to(device)
    check_against_torch(given, under_autocast(lora_linear), sequence=under_autocast(peft_sequence))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(BF16, BF16), (BF16, F32)])
def test_full_graph_through_inductor(device, fused, dtype, adapter_dtype):
    given = operands((40,), 64, 96, 8, dtype, adapter_dtype, dropout_p=0.3).to(device)
    compiled = torch.compile(lora_linear, fullgraph=True)
    got, expected = (forward_and_backward(op, given) for op in (compiled, lora_linear))
    assert torch.equal(got[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(got[1][name], gradient), name


def test_full_graph_under_inductors_cuda_graphs(cuda, fused):
    torch.manual_seed(0)
    layer = LoRALinear(64, 96, r=8, dropout=0.25).to(cuda, BF16)
    torch.nn.init.normal_(layer.lora_B["default"])
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    x = torch.randn(40, 64, device=cuda, dtype=BF16)
    masks = set()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        y.float().sum().backward()
        masks.add(float(y.float().sum()))
    assert len(masks) == 4  # another mask each time
    layer.eval()
    torch.compiler.cudagraph_mark_step_begin()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(device, fused, use_reentrant):
    torch.manual_seed(0)
    layer = LoRALinear(64, 32, r=4, dropout=0.5).to(device)
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(10, 64, device=device, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.sum().backward()
    # y is linear in x for a given mask: Σ(y − b) = x · ∂Σy/∂x only if both used one mask.
    torch.testing.assert_close((x * x.grad).sum(), (y - layer.bias).sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(BF16, BF16), (BF16, F32), (F32, F32)])
def test_opcheck(device, fused, dtype, adapter_dtype, dropout_p):
    given = operands((2, 3), dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p).to(device)
    args = tuple(t.requires_grad_() for t in given.tensors)
    opcheck(torch.ops.fused_lora.lora_linear, args, given.options, rtol=2e-2, atol=2e-2)
    opcheck(torch.ops.fused_lora.dropout_mask, (torch.tensor([4], device=device), 9, 33, 0.3))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_saved_for_backward_are_x_h_and_the_seed(device, path, dropout_p):
    given = operands((64,), 256, 128, 8, BF16, dropout_p=dropout_p).to(device)
    for leaf in (given.x, given.lora_a, given.lora_b):
        leaf.requires_grad_()
    saved = saved_tensors(lambda: lora_linear(*given.tensors, **given.options))
    assert any(t.data_ptr() == given.x.data_ptr() for t in saved)
    assert own_bytes(saved, given.tensors) == 64 * 8 * 2 + (8 if dropout_p else 0)


@pytest.mark.parametrize("adapter_dtype", [BF16, F32])
def test_no_copy_of_a_long_operand_is_ever_made(cuda, fused, adapter_dtype):
    """Beyond the results the peak is terms in the rank: less than half of x, even with fp32 partial sums."""
    rows, features, rank = 16384, 2048, 8
    given = operands((1,), features, features, rank, BF16, adapter_dtype, dropout_p=0.1).to(cuda)
    given.x = torch.randn(rows, features, device=cuda, dtype=BF16)
    for leaf in (given.x, given.lora_a, given.lora_b):
        leaf.requires_grad_()
    dy = torch.randn(rows, features, device=cuda, dtype=BF16)
    x_bytes = given.x.numel() * 2

    def peak(call):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before

    y, forward = peak(lambda: lora_linear(*given.tensors, **given.options))
    assert forward < 1.5 * x_bytes  # y and the rest
    leaves = [given.x, given.lora_a, given.lora_b]
    _, backward = peak(lambda: torch.autograd.grad(y, leaves, dy))
    assert backward < 1.5 * x_bytes  # dx and the rest


def test_a_model_trains(device, fused):
    """A few steps of two adapted layers under autocast: the loss falls as it does in plain torch."""
    losses = {}
    for name in ("here", "reference"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(LoRALinear(64, 128, r=8), torch.nn.GELU(), LoRALinear(128, 16, r=8)).to(
            device
        )
        x, target = torch.randn(96, 64, device=device), torch.randn(96, 16, device=device)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        steps = []
        path = "reference" if name == "reference" else "fused" if device.type == "cuda" else "composed"
        with fused_lora.use_path(path):
            for _ in range(20):
                with torch.autocast(device.type, dtype=BF16):
                    loss = torch.nn.functional.mse_loss(model(x).float(), target)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                steps.append(loss.item())
        losses[name] = steps
    assert losses["here"][-1] < 0.9 * losses["here"][0]
    assert losses["here"] == pytest.approx(losses["reference"], rel=3e-2)
