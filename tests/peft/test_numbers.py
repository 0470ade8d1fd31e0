"""Fused PEFT models beside plain ones: the same outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import example, output
from tests.operands import BF16, F16, F32, F64
from tests.peft.parity import (
    BATCH,
    TARGETS,
    adapted,
    adapted_net,
    assert_same,
    fused_twin,
    inputs,
    layers,
    output_and_gradients,
    same,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank and alpha patterns": {
        "rank_pattern": {"down_proj": 8, "c_proj": 2, "up": 1},
        "alpha_pattern": {"o_proj": 1, "attn.c_proj": 3, "head": -2.5},
    },
    "dropout": {"lora_dropout": 0.25},
    "everything is dropped": {"lora_dropout": 1.0},
    "base biases train": {"bias": "lora_only"},
}
# Of a Net, whose adapted layers have a bias here.
BIASED = {"target_modules": ["up", "proj"], "lora_bias": True}
NET_SETTINGS = {
    **SETTINGS,
    "lora_bias": BIASED,
    "lora_bias and dropout": {**BIASED, "lora_dropout": 0.25},
    "lora_bias without a bias beneath": {"target_modules": ["head"], "lora_bias": True},
    "modules to save": {"target_modules": ["up", "proj"], "modules_to_save": ["head"]},
    "excluded modules": {"exclude_modules": ["proj"]},
}
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]] = {  # base, adapters, autocast
    "float32": (F32, F32, None),
    "float64": (F64, F64, None),
    "bfloat16, masters": (BF16, F32, None),
    "bfloat16": (BF16, BF16, None),
    "float16, masters": (F16, F32, None),
    "autocast": (F32, F32, BF16),
    "autocast, base in bfloat16": (BF16, F32, BF16),
    "autocast to float16": (F32, F32, F16),
}


def adapters_in(model: Any, dtype: torch.dtype) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("settings", NET_SETTINGS)
def test_a_fused_model_computes_and_trains_what_peft_does(settings, precision, training):
    base, adapters, autocast = PRECISIONS[precision]
    plain = adapters_in(adapted_net(base, **NET_SETTINGS[settings]), adapters).train(training)
    fused = fused_twin(plain)
    assert [layer.why_not_fused() for layer in layers(fused)] == [None] * len(layers(plain))
    same(plain, fused, inputs(2, 5, dtype=base), autocast)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3, 0), (2, 1, 3)], ids=str)
def test_any_leading_dimensions_of_the_input_will_do(lead):
    plain = adapted_net(target_modules=["up", "head"])
    same(plain, fused_twin(plain), inputs(*lead))


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_transformers_models_compute_and_train_what_peft_does(family, settings, calls):
    plain = adapted(family, **SETTINGS[settings]).train()
    same(plain, fused_twin(plain), example(family))
    assert len(calls) == 2  # each layer once


def test_dropout_drops():
    plain = adapted_net(lora_dropout=0.25)
    evaluated, trained = fused_twin(plain), fused_twin(plain).train()
    assert not torch.allclose(evaluated(inputs(3)), trained(inputs(3)))


@pytest.mark.parametrize("drops", [True, False])
def test_the_dropout_modules_own_mode_says_whether_it_drops(drops):
    fused = fused_twin(adapted(lora_dropout=0.5))
    evaluated = output(fused, BATCH)
    for layer in layers(fused):
        layer.training = not drops
        layer.lora_dropout["default"].train(drops)
    assert torch.allclose(output(fused, BATCH), evaluated) != drops


def test_gradient_checkpointing_draws_the_same_masks_again():
    plain = adapted(lora_dropout=0.25)
    fused = fused_twin(plain).train()
    torch.manual_seed(9)
    expected = output_and_gradients(fused, BATCH)
    fused.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(9)
    checkpointed = output_and_gradients(fused, BATCH)
    assert_same(checkpointed, expected, roundings=0)


def test_gradient_checkpointing_gives_pefts_gradients():
    plain = adapted().train()
    fused = fused_twin(plain)
    for model in (plain, fused):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(output_and_gradients(fused, BATCH), output_and_gradients(plain, BATCH))


def test_a_short_training_gives_pefts_adapter():
    plain = adapted()
    fused = fused_twin(plain)
    for model in (plain, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(5):
            model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dict(fused.state_dict()), dict(plain.state_dict()))
    assert not torch.equal(fused.state_dict()[KEY], adapted().state_dict()[KEY])


KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
