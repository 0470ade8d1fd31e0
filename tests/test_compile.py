"""Tracing: the op in full graphs, its fakes, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fused_lora import LoRALinear, lora_linear
from tests.operands import BF16, DTYPES, F32, forward_and_backward, operands


def op_arguments(given, requires_grad=True):
    args = [t if t is None else t.detach().requires_grad_(requires_grad) for t in given.tensors]
    return tuple(args), dict(given.options)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_lora_linear(dtype, adapter_dtype, dropout_p):
    args, options = op_arguments(
        operands((2, 3), dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    )
    opcheck(torch.ops.fused_lora.lora_linear, args, options, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("round_adapters", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_halves(bias, round_adapters):
    given = operands((2, 3), dtype=BF16, adapter_dtype=F32, bias=bias, dropout_p=0.3)
    seed = given.options["seed"]
    tail = (1.5, 0.3, seed, round_adapters)
    opcheck(torch.ops.fused_lora.lora_linear_forward, (*given.tensors, *tail))
    y, h = torch.ops.fused_lora.lora_linear_forward(*given.tensors, *tail)
    x, weight, lora_a, lora_b, _ = given.tensors
    for needed in ([True] * 5, [True, False, True, True, False], [True, False, False, False, False]):
        x_or_none = x if needed[1] or needed[2] else None
        h_or_none = h if needed[3] else None
        args = (y, x_or_none, weight, lora_a, lora_b, h_or_none, *tail, needed)
        opcheck(torch.ops.fused_lora.lora_linear_backward, args)


def test_opcheck_dropout_mask():
    opcheck(torch.ops.fused_lora.dropout_mask, (torch.tensor([4]), 9, 33, 0.3), {"column_offset": 5})


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_meta_agrees_with_the_cpu(dtype, adapter_dtype, dropout_p):
    given = operands((2, 3), dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    y, gradients = forward_and_backward(lora_linear, given)
    meta = operands((2, 3), dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    for name in ("x", "weight", "lora_a", "lora_b", "bias"):
        setattr(meta, name, getattr(meta, name).to("meta"))
    if dropout_p:
        meta.options["seed"] = meta.options["seed"].to("meta")
    meta_y, meta_gradients = forward_and_backward(lora_linear, meta, dy=torch.empty_like(y, device="meta"))
    for real, fake in [(y, meta_y), *((gradients[n], meta_gradients[n]) for n in gradients)]:
        assert fake.is_meta
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_full_graph_forward_and_backward(dtype, adapter_dtype, dropout_p):
    given = operands((2, 3), dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        forward_and_backward(compiled, given), forward_and_backward(lora_linear, given)
    )


def test_full_graph_through_inductor_in_a_small_network_with_dropout():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        LoRALinear(24, 32, r=4), torch.nn.GELU(), LoRALinear(32, 8, r=4, dropout=0.25)
    )
    for layer in (network[0], network[2]):
        torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(6, 24, requires_grad=True)
    compiled = torch.compile(network, fullgraph=True)

    network.eval()
    torch.testing.assert_close(compiled(x), network(x))

    # In training backward must see forward's own mask: the gradient of Σy is linear in the mask, so the
    # weights of the last layer's delta tell.
    network.train()
    y = compiled(x)
    (db,) = torch.autograd.grad(y.sum(), network[2].lora_B["default"], retain_graph=True)
    hidden = network[1](network[0](x)).detach()
    b = network[2].lora_B["default"].detach()
    delta = (y - torch.nn.functional.linear(hidden, network[2].weight, network[2].bias)).detach()
    h = torch.linalg.lstsq(b, delta.t()).solution.t()  # s · drop(x) Aᵀ, from the output itself
    torch.testing.assert_close(db, h.sum(0).expand_as(db), rtol=1e-3, atol=1e-3)


def test_a_new_batch_size_does_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lora_linear, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for rows in (2, 3, 5, 17):
        given = operands((rows, 4))
        torch.testing.assert_close(
            forward_and_backward(compiled, given), forward_and_backward(lora_linear, given)
        )
        compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * 4


def test_full_graph_under_autocast():
    given = operands()

    def step(*args, **kwargs):
        with torch.autocast("cpu", dtype=BF16):
            return lora_linear(*args, **kwargs)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward_and_backward(compiled, given), forward_and_backward(step, given))


def test_export_keeps_the_op():
    layer = LoRALinear(24, 16, r=4).eval()
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(5, 24)
    program = torch.export.export(layer, (x,))
    assert "fused_lora.lora_linear" in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_draws_the_same_mask_again(use_reentrant, compiled):
    if compiled and use_reentrant:
        pytest.skip("torch.compile traces only non-reentrant checkpoints")
    torch.manual_seed(0)
    layer = LoRALinear(64, 32, r=4, dropout=0.5)
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(10, 64, requires_grad=True)

    def forward(x):
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    if compiled:
        forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
    y = forward(x)
    (dx,) = torch.autograd.grad(y.sum(), x) if not use_reentrant else (None,)
    if use_reentrant:
        y.sum().backward()
        dx = x.grad
    # y is linear in x for a given mask: y − b = x · (∂Σy/∂x) summed, only if both used one mask.
    torch.testing.assert_close((x * dx).sum(), (y - layer.bias).sum(), rtol=1e-4, atol=1e-3)


def test_differentiating_a_half_by_hand_is_refused():
    given = operands()
    x = given.x.requires_grad_()
    y, _ = torch.ops.fused_lora.lora_linear_forward(x, *given.tensors[1:], 1.0, 0.0, None, False)
    with pytest.raises(RuntimeError, match="not implemented"):
        y.sum().backward()
