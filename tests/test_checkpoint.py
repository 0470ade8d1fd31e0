"""Activation checkpointing: what is computed again is what was computed, masks included."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fused_lora import LoRALinear
from tests import models

steady = pytest.fixture(models.steady, autouse=True)


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dropping() -> LoRALinear:
    layer = LoRALinear(64, 32, r=4, dropout=0.5).requires_grad_()
    nn.init.normal_(layer.lora_B["default"])
    return layer


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_the_same_mask_is_drawn_again(use_reentrant, backend):
    layer = dropping()
    x = torch.randn(10, 64, requires_grad=True)

    def forward(x):
        return checkpoint(layer, x, use_reentrant=use_reentrant)

    if backend:
        forward = torch.compile(forward, fullgraph=True, backend=backend)
    y = forward(x)
    y.sum().backward()
    # y is linear in x for a given mask: y − b = x · (∂Σy/∂x) summed, only if both used one mask.
    torch.testing.assert_close((x * x.grad).sum(), (y - layer.bias).sum(), rtol=1e-4, atol=1e-3)
    assert not torch.equal(forward(x), y)


def test_a_selective_checkpoint_may_keep_the_op():
    layer = dropping()
    kept = [torch.ops.fused_lora.lora_linear_forward.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    x = torch.randn(10, 64, requires_grad=True)
    y = checkpoint(lambda x: layer(x.sin()).cos(), x, use_reentrant=False, context_fn=contexts)
    torch.manual_seed(1)  # what is kept is not drawn again
    gradients = torch.autograd.grad(y.sum(), [x, *layer.parameters()], retain_graph=True)
    assert all(gradient.any() for gradient in gradients)


def adapted(kind, family):
    model = models.adapted(kind, family)
    model.config.use_cache = False
    return model


def step(model, call=None, autocast=False):
    """Logits and the adapters' gradients, the masks drawn from one state of the generator."""
    model.zero_grad()
    torch.manual_seed(4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = (model if call is None else call)(**models.example(model.config.model_type))[0]
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("kind", "family"), [("ours", "llama"), ("fused", "llama"), ("fused", "gpt2")])
def test_a_transformers_model_trains_as_without(kind, family, use_reentrant, autocast):
    model = adapted(kind, family)
    expected = step(model, autocast=autocast)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = step(model, autocast=autocast)
    assert len(got[1]) == (14 if family == "llama" else 8)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["ours", "fused"])
def test_a_compiled_transformers_model_trains_as_without(kind):
    model = adapted(kind, "llama")
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook that no full graph of any linear takes
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(model, call), expected, rtol=1e-4, atol=1e-5)
