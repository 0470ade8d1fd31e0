"""Casts of frozen weights that autocast calls keep, when PEFT changes the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import fused_lora
from fused_lora import fuse, unfuse
from tests.models import output, shake
from tests.operands import BF16
from tests.peft.parity import (
    BATCH,
    TARGETS,
    adapted,
    fused_twin,
    layers,
)


def forward_under_autocast(model: Any) -> Tensor:
    with torch.autocast("cpu", dtype=BF16), torch.no_grad():
        return output(model, BATCH)


def use_base_weights(model: Any) -> None:
    """As a layer that shares them would."""
    for layer in layers(model):
        x = torch.zeros(1, layer.in_features)
        with torch.autocast("cpu", dtype=BF16), torch.no_grad():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            fused_lora.lora_linear(x, layer.base_layer.weight, a, b)


def test_merging_leaves_no_stale_cast_behind():
    """PEFT merges through weight.data, which torch's version counter does not see."""
    plain = adapted(key=1)
    fused = fused_twin(plain)
    results = []
    for model, prepare in ((plain, lambda model: None), (fused, fuse)):
        with torch.autocast("cpu", dtype=BF16):
            model.train()
            torch.autograd.backward(output(model, BATCH).float().sum())
        base = model.merge_and_unload()
        again = get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS["llama"]))
        shake(again, key=4)
        prepare(again)
        results.append(forward_under_autocast(again.eval()))
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0.05)


def merge(model: Any) -> None:
    model.merge_adapter()


def merge_safely(model: Any) -> None:
    model.merge_adapter(safe_merge=True)


def merge_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def merge_use_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    use_base_weights(model)
    model.unmerge_adapter()


def merge_while_unfused(model: Any) -> None:
    unfuse(model)
    model.merge_adapter()
    fuse(model)


@pytest.mark.parametrize(
    "edit", [merge, merge_safely, merge_and_unmerge, merge_use_and_unmerge, merge_while_unfused]
)
def test_after_every_way_to_merge_a_second_adapter_sees_the_weight_as_it_is(edit):
    model = adapted()
    fuse(model)
    forward_under_autocast(model)
    edit(model)
    for layer in layers(model):
        layer.merged_adapters.clear()  # the merged weight is the base weight from here on
    stale = forward_under_autocast(model)
    fused_lora.clear_cast_cache()
    assert torch.equal(forward_under_autocast(model), stale)
