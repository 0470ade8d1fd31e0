"""Tracing: the op in full graphs, and its fakes."""

from __future__ import annotations

import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fused_lora import LoRALinear, LoRASettings, lora_linear
from fused_lora.peft_layers import FusedPeftLinear
from tests import models
from tests.operands import BF16, DTYPES, F32, forward_and_backward, operands

steady = pytest.fixture(models.steady, autouse=True)
OP = torch.ops.fused_lora.lora_linear.default


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
    torch.manual_seed(1)
    y = compiled(x)
    assert not torch.equal(compiled(x), y)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), y)
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


def test_differentiating_a_half_by_hand_is_refused():
    given = operands()
    x = given.x.requires_grad_()
    y, _ = torch.ops.fused_lora.lora_linear_forward(x, *given.tensors[1:], 1.0, 0.0, None, False)
    with pytest.raises(RuntimeError, match="not implemented"):
        y.sum().backward()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["ours", "fused"])
def test_a_transformers_model_is_one_graph_for_every_batch_and_length(kind, family):
    """Eager and compiled draw the same masks where the compiler leaves torch's generator to torch."""
    model = models.adapted(kind, family)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    compilations = set()
    for rows, columns in ((2, 7), (3, 7), (5, 11), (2, 13)):
        results = []
        for call in (compiled, model):
            model.zero_grad()
            torch.manual_seed(1)
            logits = call(**models.example(family, rows, columns))[0]
            logits.square().mean().backward()
            results.append((logits.detach(), gradients(model)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        compilations.add(backend.frame_count)
    assert len(compilations) == 1
    targets = [node.target for node in backend.graphs[-1].graph.nodes]
    ops = targets.count(torch.ops.fused_lora.lora_linear) + targets.count(OP)
    assert ops == (7 if family == "llama" else 4)


def test_a_scale_an_adapter_or_a_switch_is_compiled_once_for_each():
    model = models.adapted("fused", "llama")
    layer = next(m for m in model.modules() if isinstance(m, FusedPeftLinear))
    layer.update_layer(
        "other", r=2, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False, config=peft.LoraConfig()
    )
    layer.eval()
    x = torch.randn(4, 32)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    changes = [
        lambda: None,
        lambda: layer.set_scale("default", 3.0),
        lambda: layer.set_adapter("other"),
        lambda: layer.enable_adapters(False),
        lambda: layer.enable_adapters(True),
        lambda: layer.set_adapter("default"),
        lambda: layer.set_scale("default", 1.0),
    ]
    for change in changes:
        change()
        torch.testing.assert_close(compiled(x), layer(x))
    known = backend.frame_count
    assert known <= len(changes)
    for change in changes:
        change()
        torch.testing.assert_close(compiled(x), layer(x))
    assert backend.frame_count == known


def test_a_layer_is_mapped_over_in_one_graph():
    """vmap asks for the layer's name, and a trace takes another layer's alpha as a symbol."""
    x = torch.randn(3, 2, 8)
    for alpha in (6.5, 5.25):
        layer = LoRALinear(8, 8, r=2, alpha=alpha)
        torch.nn.init.normal_(layer.lora_B["default"])
        mapped = torch.compile(torch.vmap(layer), fullgraph=True, backend="eager")
        torch.testing.assert_close(mapped(x), layer(x))


@pytest.mark.parametrize("several", [False, True])
def test_switching_a_layers_adapters_is_followed(several):
    layer = LoRALinear(24, 16, r=4)
    layer.add_adapter("other", LoRASettings(2, 8))
    for b in layer.lora_B.values():
        torch.nn.init.normal_(b)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    for names in ("default", ["default", "other"] if several else "other", []):
        layer.set_adapter(names)
        torch.testing.assert_close(compiled(x), layer(x))
    layer.set_adapter("default")
    layer.enabled = False
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_compiled_layer_keeps_for_backward_what_an_eager_one_keeps():
    layer = LoRALinear(64, 32, r=4, dropout=0.5)
    x = torch.randn(40, 64)

    def kept(call):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call(x)
        return sum(storages.values())

    layer.weight.requires_grad_(False)
    assert kept(torch.compile(layer, fullgraph=True, backend="aot_eager")) <= kept(layer)
