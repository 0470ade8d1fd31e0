"""PEFT's operations in any order: a fused and a plain model stay the same, whatever came before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from torch import nn

import fused_lora
from fused_lora import fuse, unfuse
from tests.models import shake
from tests.operands import BF16, F32
from tests.peft.parity import adapted_net, assert_same, fused_twin, inputs, layers, same

NAMES = ["default", "second", "third"]
names = st.sampled_from(NAMES)
some_names = st.lists(names, min_size=1, max_size=3, unique=True)
MODULES = [["up"], ["proj", "head"], ["up", "proj", "head"]]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"lora_bias": True},
    {"use_dora": True},
    {"lora_dropout": 0.5},
]
factors = st.sampled_from([0.0, 0.5, -1.5, 3])


class PlainAndFused(RuleBasedStateMachine):
    plain: Any
    fused: Any
    autocast: torch.dtype | None = None

    @initialize(
        dropout=st.sampled_from([0.0, 0.25]),
        dtype=st.sampled_from([F32, F32, BF16]),
        second=st.sampled_from(OPTIONS),
        active=some_names,
        training=st.booleans(),
        autocast=st.sampled_from([None, None, BF16]),
    )
    def build(
        self,
        dropout: float,
        dtype: torch.dtype,
        second: dict[str, Any],
        active: list[str],
        training: bool,
        autocast: torch.dtype | None,
    ) -> None:
        self.x = inputs(3, 2, dtype=dtype)
        self.plain = adapted_net(dtype, lora_dropout=dropout)
        self.fused = fused_twin(self.plain)
        self.add("second", r=3, alpha=5, target_modules=["up", "head"], **second)
        self.set_adapter(active)
        self.train(training)
        self.set_autocast(autocast)

    def on_both(self, operation: Callable[[Any], None]) -> None:
        """The same random numbers for both; where PEFT refuses, the fused model does, in the same words."""
        refusals = []
        for model in (self.plain, self.fused):
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    operation(model)
                    refusals.append("")
                except (ValueError, KeyError, RuntimeError) as error:
                    refusals.append(f"{type(error).__name__}: {error}")
        assert refusals[0] == refusals[1]

    def have(self, name: str) -> bool:
        return name in self.plain.peft_config

    def merged(self) -> bool:
        return any(layer.merged for layer in layers(self.plain))

    def has_variants(self) -> bool:
        return any(config.use_dora for config in self.plain.peft_config.values())

    # Adapters

    @precondition(lambda self: len(self.plain.peft_config) < len(NAMES))
    @rule(
        r=st.sampled_from([1, 4, 5]),
        alpha=st.sampled_from([4, 7]),
        modules=st.sampled_from(MODULES),
        option=st.sampled_from(OPTIONS),
    )
    def add_adapter(self, r: int, alpha: int, modules: list[str], option: dict[str, Any]) -> None:
        name = next(name for name in NAMES if not self.have(name))
        self.add(name, r, alpha, target_modules=modules, **option)

    def add(self, name: str, r: int, alpha: int, **config: Any) -> None:
        def operation(model: Any) -> None:
            model.add_adapter(name, LoraConfig(r=r, lora_alpha=alpha, **config))
            shake(model, key=r, only=f".{name}")

        self.on_both(operation)

    @rule(chosen=some_names)
    def set_adapter(self, chosen: list[str]) -> None:
        active = [name for name in chosen if self.have(name)]
        if active:
            self.on_both(lambda model: model.base_model.set_adapter(active))

    @precondition(lambda self: not self.merged())
    @rule(name=st.sampled_from(NAMES[1:]))
    def delete_adapter(self, name: str) -> None:
        if self.have(name):
            self.on_both(lambda model: model.delete_adapter(name))

    @precondition(lambda self: not self.have("third"))
    @rule(weights=st.sampled_from([[0.5, -2.0], [1.0, 1.0]]))
    def add_weighted_adapter(self, weights: list[float]) -> None:
        self.on_both(
            lambda model: model.add_weighted_adapter(
                ["default", "default"], weights, "third", combination_type="cat"
            )
        )

    @rule(name=names, r=st.sampled_from([4, 5]))
    def hotswap(self, name: str, r: int) -> None:
        """Other values, another rank and another scaling; merged adapters PEFT refuses to swap."""

        def operation(model: Any) -> None:
            config = copy.deepcopy(model.peft_config[name])
            config.r, config.lora_alpha = r, 3
            generator = torch.Generator().manual_seed(r)
            state = {}
            for key, value in model.state_dict().items():
                if f".lora_A.{name}." in key:
                    shape = [r, value.shape[1]]
                elif f".lora_B.{name}." in key:
                    shape = [value.shape[0], r][: value.dim()]
                else:
                    continue
                state[key] = torch.randn(shape, generator=generator).to(value.dtype) / 4
            hotswap_adapter_from_state_dict(model, state, name, config)

        if self.have(name) and not self.plain.peft_config[name].use_dora:
            self.on_both(operation)

    @precondition(lambda self: not isinstance(layers(self.plain)[0].scaling["default"], torch.Tensor))
    @rule()
    def make_scalings_tensors(self) -> None:
        self.on_both(prepare_model_for_compiled_hotswap)

    # Merging, switching, scaling

    @rule(safe=st.booleans(), chosen=st.none() | some_names)
    def merge(self, safe: bool, chosen: list[str] | None) -> None:
        self.on_both(lambda model: model.merge_adapter(adapter_names=chosen, safe_merge=safe))

    @rule()
    def unmerge(self) -> None:
        self.on_both(lambda model: model.unmerge_adapter())

    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        method = "enable_adapter_layers" if on else "disable_adapter_layers"
        self.on_both(lambda model: getattr(model.base_model, method)())

    @rule(name=names, factor=factors, how=st.sampled_from(["set_scale", "scale_layer", "unscale_layer"]))
    def scale(self, name: str, factor: float, how: str) -> None:
        def operation(model: Any) -> None:
            for layer in layers(model):
                if how == "set_scale":
                    layer.set_scale(name, factor)
                elif how == "scale_layer":
                    layer.scale_layer(factor)
                else:
                    layer.unscale_layer(factor or None)

        self.on_both(operation)

    # Training and computing

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        for model in (self.plain, self.fused):
            model.train(training)

    @rule()
    def step(self) -> None:
        """An optimizer's, by the gradients of the last comparison. Both take the plain model's: one that is
        zero but for its rounding would move them apart."""
        with torch.no_grad():
            for theirs, ours in zip(self.plain.parameters(), self.fused.parameters(), strict=True):
                if theirs.grad is not None:
                    theirs.add_(theirs.grad.sign(), alpha=-1e-3)
                    ours.copy_(theirs)

    @rule(dtype=st.sampled_from([None, BF16]))
    def set_autocast(self, dtype: torch.dtype | None) -> None:
        self.autocast = dtype

    # What PEFT refuses here leaves its hooks behind: it is not asked for.
    @precondition(lambda self: not (self.plain.training or self.merged() or self.has_variants()))
    @rule(mixed=st.lists(st.sampled_from([*NAMES, "__base__"]), min_size=3, max_size=3))
    def mix_adapters_in_a_batch(self, mixed: list[str]) -> None:
        results: list[torch.Tensor] = []

        def operation(model: Any) -> None:
            results.append(model(self.x, adapter_names=mixed).detach())

        self.on_both(operation)
        if results:
            assert_same({"output": results[1]}, {"output": results[0]})

    # What is done to the fused model alone

    @rule(how=st.sampled_from(["fuse", "unfuse", "pack", "unpack", "copy"]))
    def treat_the_fused_one(self, how: str) -> None:
        if how == "copy":
            self.fused = copy.deepcopy(self.fused)
        elif how != "pack" or any(layer.why_not_fused() is None for layer in fused_layers(self.fused)):
            treatment: dict[str, Any] = {
                "fuse": fuse,
                "unfuse": unfuse,
                "pack": fused_lora.pack,
                "unpack": fused_lora.unpack,
            }
            treatment[how](self.fused)

    @invariant()
    def are_the_same(self) -> None:
        if self.exact_is_comparable():
            same(self.plain, self.fused, self.x, self.autocast)

    def exact_is_comparable(self) -> bool:
        """torch's own dropout draws another mask in float64, and 16 bits are held against float64."""
        if self.autocast is None and self.x.dtype == F32:
            return True
        return not any(
            type(dropout) is nn.Dropout and dropout.training
            for layer in layers(self.fused)
            if getattr(layer, "why_not_fused", lambda: "")() is not None
            for dropout in layer.lora_dropout.values()
        )


def fused_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in layers(model) if hasattr(layer, "why_not_fused")]


# Not shrunk: that takes minutes, and a run is short as it is.
PlainAndFused.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
)
TestAnyOrder = PlainAndFused.TestCase
