"""Merging: the same outputs from one weight, and the original back, the same object, bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import fused_lora
from fused_lora import LoRALinear, LoRASettings
from fused_lora.swap import lora_layers
from tests import models
from tests.models import Snapshot, example, output, shake, tiny

steady = pytest.fixture(models.steady, autouse=True)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]
IN, OUT = 24, 16
LINEARS: dict[str, Any] = {
    "Linear": lambda: nn.Linear(IN, OUT),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "FalconLinear": lambda: FalconLinear(IN, OUT, bias=False),
}


@pytest.fixture(params=LINEARS)
def linear(request) -> nn.Module:
    module: nn.Module = LINEARS[request.param]()
    return module


def adapted(linear: nn.Module | None = None, **adapters: LoRASettings) -> LoRALinear:
    layer = LoRALinear.adopt(nn.Linear(IN, OUT) if linear is None else linear)
    for name, settings in (adapters or {"default": LoRASettings(4)}).items():
        layer.add_adapter(name, settings)
        nn.init.normal_(layer.lora_B[name], std=0.1)
    return layer


def by_pickle(layer: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# One layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_computes_what_unmerged_does(linear, dtype):
    layer = adapted(linear.to(dtype))
    x = torch.randn(5, IN, dtype=dtype)
    unmerged = layer(x).double()
    layer.merge()
    # Rounding the merged weight once moves each product by at most half a unit in its last place.
    bound = (
        2 * torch.finfo(dtype).eps * (x.abs().double().sum(1).max() * layer.weight.abs().max().double() + 2)
    )
    assert (layer(x).double() - unmerged).abs().max() < bound


def test_merged_and_unmerged_several_adapters_compute_the_same(linear):
    layer = adapted(linear, first=LoRASettings(4), second=LoRASettings(2, alpha=-3.0, rslora=True))
    layer.set_adapter(["first", "second"])
    x = torch.randn(5, IN)
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged)


def test_merged_it_needs_no_dropout_and_no_adapter():
    layer = adapted(default=LoRASettings(4, dropout=0.5))
    layer.merge()
    x = torch.randn(5, IN)
    assert torch.equal(layer(x), layer(x))
    assert not layer(x).requires_grad or layer.bias.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_gives_the_original_weight_back_bit_for_bit(linear, dtype):
    layer = adapted(linear.to(dtype))
    original, values = layer.weight, layer.weight.detach().clone()
    x = torch.randn(5, IN, dtype=dtype)
    y = layer(x)
    layer.merge()
    merged = layer.weight
    assert not torch.equal(merged, values)
    layer.unmerge()
    assert layer.weight is original
    assert torch.equal(layer.weight, values)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("trains", [True, False])
def test_unmerge_gives_back_whether_the_weight_trains(trains):
    layer = adapted()
    layer.weight.requires_grad_(trains)
    layer.merge()
    assert not layer.weight.requires_grad
    layer.unmerge()
    assert layer.weight.requires_grad == trains


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_merging_rounds_once_from_float32(linear, dtype):
    layer = adapted(linear.to(dtype), first=LoRASettings(4), second=LoRASettings(2, alpha=5.0))
    layer.set_adapter(["first", "second"])
    total = layer.weight.float()
    for name, scaling in (("first", 8.0), ("second", 2.5)):
        delta = scaling * (layer.lora_B[name] @ layer.lora_A[name])
        total = total + (delta.t() if layer.fan_in_fan_out else delta)
    layer.merge()
    assert torch.equal(layer.weight, total.to(dtype))


def test_delta_weight_has_the_weights_layout(linear):
    layer = adapted(linear)
    delta = layer.delta_weight("default")
    assert delta.shape == layer.weight.shape
    assert delta.dtype == F32
    original = layer.weight
    layer.merge()
    torch.testing.assert_close(layer.weight, original + delta)


def test_merging_leaves_a_tied_weight_as_it_is():
    embedding = nn.Embedding(OUT, IN)
    head = nn.Linear(IN, OUT, bias=False)
    head.weight = embedding.weight
    values = embedding.weight.detach().clone()
    layer = adapted(head)
    layer.merge()
    assert torch.equal(embedding.weight, values)
    layer.unmerge()
    assert layer.weight is embedding.weight
    assert torch.equal(embedding.weight, values)


def test_without_an_active_adapter_there_is_nothing_to_merge():
    layer = adapted()
    layer.set_adapter([])
    original = layer.weight
    layer.merge()
    assert not layer.merged
    assert layer.weight is original


def test_the_weight_kept_aside_is_no_parameter():
    layer = adapted()
    names = [name for name, _ in layer.named_parameters()]
    layer.merge()
    assert [name for name, _ in layer.named_parameters()] == names


# Files and copies while merged


@pytest.mark.parametrize("keep_vars", [False, True])
def test_state_dict_while_merged_is_that_of_the_unmerged_layer(keep_vars):
    layer = adapted()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    original = layer.weight
    layer.merge()
    state = layer.state_dict(keep_vars=keep_vars)
    assert list(state) == list(before)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert state["weight"].requires_grad == keep_vars
    assert (state["weight"] is original) == keep_vars


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_loading_while_merged_is_refused_and_changes_nothing(options):
    layer = adapted()
    other = adapted().state_dict()
    layer.merge()
    before = Snapshot.of(layer)
    with pytest.raises(RuntimeError, match="the layer is merged; unmerge it before"):
        layer.load_state_dict(other, **options)
    before.check(layer)
    assert layer.merged
    layer.unmerge()
    layer.load_state_dict(other)
    assert torch.equal(layer.weight, other["weight"])


def test_loading_a_checkpoint_names_the_merged_layer():
    layer = adapted()
    model = nn.Sequential(nn.Linear(IN, IN), layer)
    state = copy.deepcopy(model).state_dict()
    layer.merge()
    with pytest.raises(RuntimeError, match="1: the layer is merged"):
        model.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_a_copy_of_a_merged_layer_unmerges_by_itself(linear, copied):
    layer = adapted(linear)
    values = layer.weight.detach().clone()
    layer.merge()
    twin = copied(layer)
    x = torch.randn(5, IN)
    assert torch.equal(twin(x), layer(x))
    twin.unmerge()
    assert torch.equal(twin.weight, values)
    assert layer.merged
    layer.unmerge()
    assert twin.weight is not layer.weight


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_conversion_while_merged_takes_the_weight_kept_aside_along(linear, dtype):
    layer = adapted(linear)
    original, values = layer.weight, layer.weight.detach().clone()
    layer.merge()
    layer.to(dtype)
    layer.unmerge()
    assert layer.weight is original
    assert torch.equal(layer.weight, values.to(dtype))


def test_a_deep_copy_of_a_merged_model_keeps_its_ties():
    model = tiny("llama", tie_word_embeddings=True)
    fused_lora.add_lora(model, ["lm_head"], r=4)
    shake(model)
    fused_lora.merge(model)
    twin = copy.deepcopy(model)
    fused_lora.unmerge(twin)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


# What is refused


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: layer.add_adapter("new", LoRASettings(2)),
        lambda layer: layer.delete_adapter("default"),
        lambda layer: layer.reset_adapter("default"),
        lambda layer: layer.set_adapter("other"),
        lambda layer: layer.set_adapter([]),
        lambda layer: setattr(layer, "enabled", False),
        lambda layer: layer.merge(),
    ],
    ids=["add", "delete", "reset", "set", "set none", "disable", "merge"],
)
def test_every_edit_of_a_merged_layer_is_refused_and_changes_nothing(edit):
    layer = adapted(other=LoRASettings(2), default=LoRASettings(4))
    layer.merge()
    before, state = Snapshot.of(layer), (dict(layer.settings), layer.active_adapters, layer.enabled)
    with pytest.raises(RuntimeError, match="merged"):
        edit(layer)
    before.check(layer)
    assert (dict(layer.settings), layer.active_adapters, layer.enabled) == state


def test_a_layer_that_is_not_merged_cannot_be_unmerged():
    with pytest.raises(RuntimeError, match="the layer is not merged"):
        adapted().unmerge()


def test_switched_off_adapters_are_not_merged():
    layer = adapted()
    layer.enabled = False
    with pytest.raises(RuntimeError, match="switched off"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize(("dtype", "value"), [(F32, torch.inf), (F32, torch.nan), (F16, 6e4)], ids=str)
def test_a_weight_that_would_not_be_finite_is_refused(dtype, value):
    """The last is finite in the adapter and too large for the weight's dtype."""
    layer = adapted(nn.Linear(IN, OUT).to(dtype))
    original, values = layer.weight, layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].fill_(value)
    with pytest.raises(ValueError, match=r"merging adapters \['default'\] gives a weight that is not finite"):
        layer.merge()
    assert not layer.merged
    assert layer.weight is original
    assert torch.equal(layer.weight, values)


# A model


def lora_model(family: str = "llama", targets: Any = "o_proj+fc2", **sizes: Any) -> Any:
    model = tiny(family, **sizes)
    fused_lora.add_lora(model, targets, r=4)
    shake(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_merged_model_computes_the_same_and_unmerges_to_the_same(family):
    model = lora_model(family)
    batch = example(family)
    unmerged = output(model, batch)
    before = Snapshot.of(model)
    fused_lora.merge(model)
    assert all(layer.merged for layer in lora_layers(model).values())
    torch.testing.assert_close(output(model, batch), unmerged, rtol=1e-4, atol=1e-4)
    fused_lora.unmerge(model)
    before.check(model)
    assert torch.equal(output(model, batch), unmerged)


def test_a_head_tied_to_the_embedding_merges_alone():
    model = lora_model(targets=["lm_head"], tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batch = example("llama")
    unmerged = output(model, batch)
    embedded = model.model.embed_tokens(batch["input_ids"])
    fused_lora.merge(model)
    assert torch.equal(model.model.embed_tokens(batch["input_ids"]), embedded)
    torch.testing.assert_close(output(model, batch), unmerged, rtol=1e-4, atol=1e-4)
    fused_lora.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def poison(model: nn.Module) -> None:
    """The last layer's adapter cannot be merged."""
    *_, last = lora_layers(model).values()
    with torch.no_grad():
        last.lora_B["default"].fill_(torch.inf)


def test_a_model_merges_all_of_its_layers_or_none():
    model = lora_model(num_hidden_layers=2)
    poison(model)
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match="not finite"):
        fused_lora.merge(model)
    before.check(model)
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_a_failed_second_merge_leaves_the_first_in_place():
    model = lora_model()
    fused_lora.merge(model)
    merged = output(model, example("llama"))
    with pytest.raises(RuntimeError, match="merged already"):
        fused_lora.merge(model)
    assert torch.equal(output(model, example("llama")), merged)


def test_removing_with_merge_takes_all_layers_or_none():
    model = lora_model(num_hidden_layers=2)
    poison(model)
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match="not finite"):
        fused_lora.remove_lora(model, merge=True)
    before.check(model)
    assert not any(layer.merged for layer in lora_layers(model).values())


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_removing_with_merge_leaves_plain_linears_that_compute_the_same(family, merged_before):
    frozen = tiny(family)
    kinds = {name: type(module) for name, module in frozen.named_modules()}
    model = lora_model(family)
    batch = example(family)
    unmerged = output(model, batch)
    if merged_before:
        fused_lora.merge(model)
    assert fused_lora.remove_lora(model, merge=True) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert list(model.state_dict()) == list(frozen.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(output(model, batch), unmerged, rtol=1e-4, atol=1e-4)


def test_removing_without_merge_undoes_a_merge():
    model = tiny("llama")
    before = Snapshot.of(model)
    fused_lora.add_lora(model, "o_proj+fc2", r=4)
    shake(model)
    fused_lora.merge(model)
    fused_lora.remove_lora(model)
    before.check(model)


def test_switching_a_merged_models_adapter_changes_no_layer():
    model = lora_model(targets="o_proj")
    fused_lora.add_lora(model, "fc2", r=4, adapter_name="second")
    shake(model, key=2)
    fused_lora.merge(model)  # of the second adapter, so that the o_proj layers are not merged
    active = [layer.active_adapters for layer in lora_layers(model).values()]
    before = Snapshot.of(model)
    with pytest.raises(RuntimeError, match="merged"):
        fused_lora.set_adapter(model, "default")
    assert [layer.active_adapters for layer in lora_layers(model).values()] == active
    before.check(model)


@pytest.mark.parametrize("change", [fused_lora.merge, fused_lora.unmerge])
def test_a_model_without_adapters_has_nothing_to_merge(change):
    with pytest.raises(ValueError, match="no layer of it has an adapter"):
        change(tiny("llama"))
