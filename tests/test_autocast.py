"""Under autocast x, W and b take the autocast dtype and the adapters stay what they are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fused_lora
from fused_lora import LoRALinear, lora_linear, reference
from tests.operands import BF16, F16, F32, F64, check_against_torch, forward_and_backward, operands

pytestmark = pytest.mark.usefixtures("either_path")


def under_autocast(op, dtype):
    def call(*args, **kwargs):
        with torch.autocast("cpu", dtype=dtype):
            return op(*args, **kwargs)

    return call


def peft_sequence(x, weight, lora_a, lora_b, bias, *, scaling, dropout_p, seed=None):
    """PEFT's forward, whose linears autocast sees one by one."""
    y = F.linear(x, weight, bias)
    x_hat = x.to(lora_a.dtype)
    if dropout_p:
        mask = reference.dropout_mask(seed, x.shape[0], x.shape[1], dropout_p)
        x_hat = x_hat * mask * reference.dropout_rule(dropout_p)[1]
    return (y + F.linear(F.linear(x_hat, lora_a), lora_b) * scaling).to(y.dtype)


@pytest.mark.parametrize("path", ["composed", "reference"])
@pytest.mark.parametrize("autocast_dtype", [BF16, F16])
@pytest.mark.parametrize("base_dtype", [F32, "autocast"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_as_exact_as_peft_under_autocast(path, autocast_dtype, base_dtype, dropout_p):
    base = autocast_dtype if base_dtype == "autocast" else base_dtype
    given = operands((65,), 136, 72, 8, base, F32, dropout_p=dropout_p)
    with fused_lora.use_path(path):
        check_against_torch(
            given,
            under_autocast(lora_linear, autocast_dtype),
            sequence=under_autocast(peft_sequence, autocast_dtype),
        )


def test_gradients_keep_their_operands_dtype():
    y, gradients = forward_and_backward(under_autocast(lora_linear, BF16), operands(dtype=F32))
    assert y.dtype == BF16
    assert {name: g.dtype for name, g in gradients.items()} == {"x": F32, "lora_a": F32, "lora_b": F32}


def test_masters_are_rounded_inside():
    """The result is that of the same call with A and B in bf16: autocast's precision, not the masters'."""
    given = operands(dtype=BF16, adapter_dtype=F32)
    rounded = operands(dtype=BF16, adapter_dtype=F32)
    rounded.lora_a, rounded.lora_b = rounded.lora_a.to(BF16), rounded.lora_b.to(BF16)
    with torch.autocast("cpu", dtype=BF16):
        y = lora_linear(*given.tensors, **given.options)
    assert torch.equal(y, lora_linear(*rounded.tensors, **rounded.options))


def test_float64_is_left_alone():
    given = operands(dtype=F64)
    with torch.autocast("cpu", dtype=BF16):
        y = lora_linear(*given.tensors, **given.options)
    assert y.dtype == F64


def test_disabled_autocast_changes_nothing():
    given = operands()
    with torch.autocast("cpu", dtype=BF16), torch.autocast("cpu", enabled=False):
        y = lora_linear(*given.tensors, **given.options)
    assert torch.equal(y, lora_linear(*given.tensors, **given.options))


def trained_step(layer, x):
    with torch.autocast("cpu", dtype=BF16):
        return layer(x)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = LoRALinear(24, 16, r=4)
    torch.nn.init.normal_(layer.lora_B["default"])
    layer.weight.requires_grad_(False)
    fused_lora.clear_cast_cache()
    return layer


def casts_of_the_weight(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as p:
        call()
    return sum(e.name == "aten::_to_copy" and e.input_shapes[0] == [16, 24] for e in p.events())


def test_a_frozen_weight_is_cast_once(layer):
    x = torch.randn(5, 24)
    counts = [casts_of_the_weight(lambda: trained_step(layer, x)) for _ in range(3)]
    assert counts == [1, 0, 0]


def test_autocasts_cache_switch_is_honoured(layer):
    x = torch.randn(5, 24)

    def call():
        with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
            layer(x)

    assert [casts_of_the_weight(call) for _ in range(2)] == [1, 1]


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "copied into": lambda layer: layer.weight.copy_(torch.ones(16, 24)),
    "loaded": lambda layer: layer.load_state_dict({**layer.state_dict(), "weight": torch.ones(16, 24)}),
    "replaced": lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.ones(16, 24))),
    "data replaced": lambda layer: setattr(layer.weight, "data", torch.ones(16, 24)),
    "merged": lambda layer: layer.merge(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_weight_is_cast_anew(layer, change):
    x = torch.randn(5, 24)
    trained_step(layer, x)
    with torch.no_grad():
        change(layer)
    fresh = LoRALinear(24, 16, r=4)
    fresh.load_state_dict({**layer.state_dict(), "weight": layer.weight.detach().clone()})
    if layer.merged:
        fresh.enabled = False
    assert torch.equal(trained_step(layer, x), trained_step(fresh, x))


def test_a_transposed_view_finds_the_same_cast(layer):
    weight = layer.weight.detach().t().contiguous()

    def call():
        with torch.autocast("cpu", dtype=BF16):
            lora_linear(torch.randn(5, 24), weight.t(), layer.lora_A["default"], layer.lora_B["default"])

    def casts():
        with torch.profiler.profile(record_shapes=True) as p:
            call()
        return sum(e.name == "aten::_to_copy" and e.input_shapes[0] == [16, 24] for e in p.events())

    assert [casts() for _ in range(3)] == [1, 0, 0]


def test_a_weight_that_trains_gets_its_gradient(layer):
    x = torch.randn(5, 24)
    trained_step(layer, x)
    layer.weight.requires_grad_()
    trained_step(layer, x).sum().backward()
    assert layer.weight.grad.dtype == F32
    expected = x.to(BF16).float().sum(0).expand(16, -1)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=2e-2, atol=2e-2)


def test_a_cast_made_in_inference_mode_serves_training(layer):
    x = torch.randn(5, 24)
    with torch.inference_mode():
        trained_step(layer, x)
    x.requires_grad_()
    trained_step(layer, x).sum().backward()
    assert x.grad is not None


def test_casts_die_with_their_weights():
    fused_lora.clear_cast_cache()
    x, a, b = torch.randn(2, 512), torch.randn(1, 512), torch.randn(512, 1)

    def call():
        # A new weight each time: its memory may come back at the same address.
        weight = torch.randn(512, 512)
        with torch.autocast("cpu", dtype=BF16):
            y = lora_linear(x, weight, a, b)
        expected = lora_linear(x.to(BF16), weight.to(BF16), a.to(BF16), b.to(BF16))
        assert torch.equal(y, expected)

    for _ in range(20):
        call()


def test_another_weight_at_the_same_address_is_cast_itself():
    """As where one's memory was given back, by `untyped_storage().resize_(0)`, and the other's allocated."""
    given = operands((3,), 16, 16)
    memory = given.weight.numpy()
    first, second = torch.from_numpy(memory), torch.from_numpy(memory)

    def call(weight):
        with torch.autocast("cpu", BF16):
            return lora_linear(given.x, weight, given.lora_a, given.lora_b)

    before = call(first)
    memory *= 2
    assert first.data_ptr() == second.data_ptr()
    assert not torch.equal(call(second), before)
    assert torch.equal(call(second), call(given.weight.clone()))
