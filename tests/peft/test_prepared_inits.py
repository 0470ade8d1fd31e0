"""Initial adapters that PEFT takes from data or from a quantised weight: its own preparation of a tiny model,
then the plain and the fused model."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch.overrides import TorchFunctionMode

from fused_lora import fuse
from tests import models
from tests.models import example, tiny
from tests.peft.parity import BATCH, TARGETS, fused_twin, layers, same

steady = pytest.fixture(models.steady, autouse=True)
SETTINGS: dict[str, Any] = {"r": 4, "target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM"}


def by_covariance(model: Any, method: str) -> Any:
    # PEFT's corda module wants one name of a package that PEFT does not install.
    if "attr" not in sys.modules and importlib.util.find_spec("attr") is None:
        sys.modules["attr"] = types.SimpleNamespace(dataclass=dataclasses.dataclass)  # type: ignore[assignment]
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method=method), **SETTINGS)

    def run() -> None:
        for _ in range(4):
            model(input_ids=torch.randint(3, models.VOCABULARY, (1, 40)))

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def by_gradients(model: Any, **options: str) -> Any:
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**options), **SETTINGS)

    def step() -> None:
        batch = example("llama", rows=4)
        model(**batch, labels=batch["input_ids"]).loss.backward()

    preprocess_loraga(model, config, step)
    return get_peft_model(model, config)


def by_activations(model: Any) -> Any:
    adapted = get_peft_model(
        model, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), **SETTINGS)
    )
    batch = example("llama", rows=4, columns=12)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    initialize_lora_eva_weights(adapted, [batch] * 3, show_progress_bar=False)
    return adapted


class InsteadOfCUDA(TorchFunctionMode):
    """What is moved to CUDA stays here: PEFT quantises nowhere else, though the arithmetic needs no GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            args = ["cpu" if str(value).startswith("cuda") else value for value in args]
            if "device" in kwargs:
                kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def by_quantising(model: Any, bits: int) -> Any:
    pytest.importorskip("bitsandbytes")
    config = LoraConfig(
        init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=bits, loftq_iter=2), **SETTINGS
    )
    with InsteadOfCUDA():
        return get_peft_model(model, config)


INITS: dict[str, Callable[[Any], Any]] = {
    "corda, ipm": lambda model: by_covariance(model, "ipm"),
    "corda, kpm": lambda model: by_covariance(model, "kpm"),
    "lora_ga, stable": lambda model: by_gradients(model, direction="ArB2r", scale="stable"),
    "lora_ga, gd_scale": lambda model: by_gradients(model, direction="ArBr", scale="gd_scale"),
    "eva": by_activations,
    "loftq, 4 bits": lambda model: by_quantising(model, 4),
    "loftq, 8 bits": lambda model: by_quantising(model, 8),
}


def adapted(init: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's and torch's, on hooks and memory
        return INITS[init](tiny("llama")).eval()


@pytest.mark.parametrize("init", INITS)
def test_a_prepared_adapter_gives_pefts_model(init):
    plain = adapted(init)
    default = get_peft_model(tiny("llama"), LoraConfig(**SETTINGS))
    for layer, other in zip(layers(plain), layers(default), strict=True):
        moved = not torch.equal(layer.base_layer.weight, other.base_layer.weight)
        assert moved is (init != "eva")
        if init == "eva":  # rows of A that are singular vectors of what the layer was given
            a = layer.lora_A["default"].weight
            torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
    fused = fused_twin(plain)
    assert [layer.why_not_fused() for layer in layers(fused)] == [None, None]
    same(plain, fused, BATCH)
    same(plain, fused, BATCH, autocast=torch.bfloat16)


def test_eva_initialises_a_model_that_is_fused_already():
    """It hooks the layers for as long as it collects, swaps their ranks, and looks at their inputs."""
    plain = adapted("eva")
    fused = get_peft_model(
        tiny("llama"), LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), **SETTINGS)
    ).eval()
    fuse(fused)
    torch.manual_seed(0)
    batch = example("llama", rows=4, columns=12)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    initialize_lora_eva_weights(fused, [batch] * 3, show_progress_bar=False)
    assert [layer.why_not_fused() for layer in layers(fused)] == [None, None]
    same(plain, fused, BATCH)
