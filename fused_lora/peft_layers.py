"""PEFT's LoRA layers, computed by the fused ops: the same modules, keys and files, another forward."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fused_lora.adapter_sum import Adapter, lora_sum
from fused_lora.any_base import KEEPS_DTYPE, add_adapters, with_biases
from fused_lora.gathered import autocast_copy, is_gathered
from fused_lora.grouped import GROUP, Groupable, Operands, computed_together, has_hooks, pays
from fused_lora.grouping import set_grouped, ungroup
from fused_lora.layer import (
    is_partitioned,
    is_plain_parameter,
    linear_obstacle,
    operand_of,
    qualified,
    stores_transposed,
)
from fused_lora.mixed_batch import adapter_index, present
from fused_lora.ops import is_sharded, lora_linear, lora_linear_mixed
from fused_lora.packed import PacksWeight, held_weight
from fused_lora.report import Report, Swapped
from fused_lora.targets import Skipped
from fused_lora.tracing import constant

try:
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import LoraLayer
except ImportError as error:
    raise ImportError(
        f"fused_lora.fuse works on PEFT models and PEFT does not import ({error}): pip install peft"
    ) from error


class FusedAdapters:
    """A LoRA layer of PEFT's whose plain adapters, neither merged nor disabled, are one fused call. Its base
    layer computes by itself. In every other state PEFT's own forward runs; `why_not_fused` says which."""

    __slots__ = ()  # so that a layer may become such a one, by its __class__
    keeps_dtype: bool  # KEEPS_DTYPE's

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = _active_adapters(self, plain_base=False)
        if args or kwargs or isinstance(active, str) or x.is_nested:
            y: Tensor = peft_class(type(self)).forward(self, x, *args, **kwargs)
            return y
        return add_adapters(self, self.keeps_dtype, x, active)

    def why_not_fused(self) -> str | None:
        """Why a call would now run PEFT's own forward; None where it would run fused.

        Besides, PEFT's own forward runs for nested tensors, for calls with other arguments than
        `adapter_names`, and where those name an adapter that does not run fused.
        """
        active = _active_adapters(self, self.why_base_not_fused() is None)
        return active if isinstance(active, str) else None

    def why_base_not_fused(self) -> str | None:
        """Why the base layer computes by itself, and the adapters alone are fused; None where one call is
        both."""
        layer: Any = self
        return base_obstacle(layer.base_layer) or f"a {peft_class(type(self)).__name__} calls it"


class FusedPeftLinear(PeftLinear, FusedAdapters, PacksWeight, Groupable):  # type: ignore[misc]
    """peft.tuners.lora.Linear with one fused call for what is trained and served most: plain adapters,
    neither merged nor disabled, active or named for a batch, and the base layer with them where it is a plain
    linear."""

    keeps_dtype = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        # What does not fit raises in PEFT's own forward.
        if names is not None and not args and len(kwargs) == 1 and not x.is_nested and len(names) == len(x):
            batch = tuple(names)
            mixed = _adapters_of_batch(self, batch)
            if mixed:
                return self._forward_mixed(x, batch, mixed)
        base = _part(self, "base_layer")
        plain_base = base_obstacle(base) is None
        active = _active_adapters(self, plain_base)
        if args or kwargs or isinstance(active, str) or x.is_nested:
            # By its name and not super(): a wrapper may still hold this method after `unfuse`.
            y: Tensor = PeftLinear.forward(self, x, *args, **kwargs)
            return y
        if not plain_base:
            return add_adapters(self, self.keeps_dtype, x, active)
        if GROUP in self.__dict__ and pays(self, x):
            together = computed_together(self, x, _operands_of(self, active))
            if together is not None:
                return together
        weight, bias = _operand(base), base._parameters["bias"]
        if len(active) == 1 and not isinstance(active[0].scaling, Tensor):
            (parts,) = active
            y = lora_linear(
                x,
                weight,
                parts.a._parameters["weight"],  # type: ignore[arg-type]
                parts.b._parameters["weight"],  # type: ignore[arg-type]
                bias,
                scaling=parts.scaling,
                dropout_p=parts.dropout_p(),
            )
        else:
            y = lora_sum(x, weight, bias, [parts.operands() for parts in active])
        return with_biases(y, active)

    def _forward_mixed(self, x: Tensor, batch: tuple[str, ...], mixed: list[AdapterParts]) -> Tensor:
        base = _part(self, "base_layer")
        return lora_linear_mixed(
            x,
            _operand(base),
            [parts.a._parameters["weight"] for parts in mixed],  # type: ignore[misc]
            [parts.b._parameters["weight"] for parts in mixed],  # type: ignore[misc]
            adapter_index(batch, tuple(parts.name for parts in mixed), x.device),
            base._parameters["bias"],
            scaling=[parts.scaling for parts in mixed],
        )

    def operands(self) -> Operands | None:
        if self.why_base_not_fused() is not None:
            return None
        active = _active_adapters(self, plain_base=True)
        return None if isinstance(active, str) else _operands_of(self, active)

    def why_base_not_fused(self) -> str | None:
        return base_obstacle(_part(self, "base_layer"))

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)
        self._weight_changed()  # some initial adapters are taken out of the weight

    def merge(self, *args: Any, **kwargs: Any) -> None:
        super().merge(*args, **kwargs)
        self._weight_changed()

    def unmerge(self) -> None:
        super().unmerge()
        self._weight_changed()

    def _weight_changed(self) -> None:
        # PEFT writes through weight.data, past the version counter that casts of the weight are kept by.
        weight = getattr(self.get_base_layer(), "weight", None)
        # One made in inference mode has no version, and no cast of it is kept.
        if isinstance(weight, Tensor) and not weight.is_inference():
            torch.autograd.graph.increment_version(weight)

    def linear_to_pack(self) -> tuple[nn.Module, bool]:
        return self.base_layer, stores_transposed(type(self.base_layer))

    def needs_plain_weight(self) -> str | None:
        return self.why_not_fused() or self.why_base_not_fused()


def peft_class(kind: type) -> Any:
    """The class of PEFT's that a fused layer was; another class itself."""
    if not issubclass(kind, FusedAdapters):
        return kind
    return next(base for base in kind.__mro__ if qualified(base) in KEEPS_DTYPE)


def fused_class(kind: Any) -> Any:
    """What a layer of one of PEFT's classes becomes; None where it stays."""
    if issubclass(kind, FusedAdapters):
        return kind
    if kind is PeftLinear:
        return FusedPeftLinear
    return _fused_classes(kind) if qualified(kind) in KEEPS_DTYPE else None


@functools.cache
def _fused_classes(kind: Any) -> Any:
    # PEFT has classes for the libraries that are installed alone, and imports those with them.
    own = {
        "__module__": __name__,
        "forward": FusedAdapters.forward,
        "keeps_dtype": KEEPS_DTYPE[qualified(kind)],
    }
    # PEFT's class comes first, or Python would not let a layer change between the two.
    return type(f"Fused{kind.__name__}", (kind, FusedAdapters), own)


def __getattr__(name: str) -> Any:
    # Pickles name these classes.
    for path in KEEPS_DTYPE:
        module, _, own = path.rpartition(".")
        if name == f"Fused{own}":
            return _fused_classes(getattr(importlib.import_module(module), own))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AdapterParts:
    """What PEFT computes one adapter of a layer from."""

    __slots__ = ("a", "b", "dropout", "name", "scaling")
    a: nn.Module
    b: nn.Module
    dropout: nn.Module
    scaling: Any

    def __init__(self, layer: Any, name: str) -> None:
        # Past nn.Module's own lookup, as all below that runs at every call: it takes up to 1 µs each.
        modules = layer._modules
        self.name = name
        self.a = modules["lora_A"]._modules[name]
        self.b = modules["lora_B"]._modules[name]
        self.dropout = modules["lora_dropout"]._modules[name]
        self.scaling = layer.scaling[name]

    def dropout_p(self) -> float:
        # A Dropout's, or an Identity's, which has none.
        return self.dropout.__dict__.get("p", 0.0) if self.dropout.training else 0.0

    def operands(self) -> Adapter:
        a, b = self.a._parameters["weight"], self.b._parameters["weight"]
        return Adapter(a, b, self.scaling, self.dropout_p())  # type: ignore[arg-type]


def fuse(model: nn.Module, *, grouped: bool = True) -> Report:
    """Makes the LoRA layers of a PEFT model fused, in place: keys, files and PEFT's methods stay.

    A base layer that is no plain linear (quantised, with hooks, a module of one's own) computes by itself,
    and its adapters alone are fused, with `lora_add`. What is not covered keeps PEFT's own forward and stands
    in the report with the reason: whole layers, and adapters of a fused layer, for as long as they are
    active. What changes afterwards is seen at the next call, and `layer.why_not_fused()` tells. Layers that
    PEFT adds later are plain until `fuse` is called again. grouped: compute layers that share an input
    together (fused_lora.group). Raises ValueError for a model without LoRA layers. `unfuse` undoes it.
    """
    report = Report("fused PEFT layers")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no LoRA layers of PEFT's")
    for name, layer in layers.items():
        reason = layer_obstacle(layer)
        if reason:
            report.skipped.append(Skipped(name, reason))
            continue
        layer.__class__ = fused_class(type(layer))
        if type(layer) is FusedPeftLinear:
            layer._weight_changed()  # PEFT may have merged or initialised unseen
        for adapter in layer.lora_A:
            reason = _obstacle_between_calls(layer, AdapterParts(layer, adapter))
            if reason:
                report.unfused_adapters.append(Skipped(name, reason))
        size = sum(p.numel() for part in (layer.lora_A, layer.lora_B) for p in part.parameters())
        own = layer.why_base_not_fused()
        note = f"adapter fused over the base's own forward: {own}" if own else ""
        report.swapped.append(Swapped(name, layer.in_features, layer.out_features, size, note))
    report.count_parameters(model)
    report.groups = set_grouped(model, grouped)
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every fused layer its own class back. Returns `model`."""
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, FusedAdapters)}
    for name, layer in layers.items():
        if type(layer) is not fused_class(peft_class(type(layer))):  # as FSDP2 does with one that it is given
            raise ValueError(f"model: {name} was made a {type(layer).__name__} after fuse: undo that first")
    ungroup(model)
    for layer in layers.values():
        if isinstance(layer, FusedPeftLinear):
            layer._weight_changed()  # from here on PEFT may merge unseen
        layer.__class__ = peft_class(type(layer))
    return model


def layer_obstacle(layer: Any) -> str | None:
    """Why a LoRA layer of PEFT's cannot run fused, whichever adapter is active; None where it can."""
    if fused_class(type(layer)) is None:
        return f"a {type(layer).__module__}.{type(layer).__name__} is none of PEFT's LoRA linears"
    if "forward" in vars(layer):
        return "its forward is overridden on the instance"
    reason = alone_obstacle(layer.base_layer)
    if reason:
        return f"its base layer: {reason}"
    reasons = [_obstacle_between_calls(layer, AdapterParts(layer, name)) for name in layer.lora_A]
    if reasons and all(reasons):
        return reasons[0]
    return None


def alone_obstacle(base: nn.Module) -> str | None:
    """Why the adapters over a base layer are not fused either, where its own forward must run."""
    if _is_within_attention(type(base)):
        return "nn.MultiheadAttention reads its weight past its forward"
    if is_sharded(base._parameters.get("weight")) and not is_gathered(base):  # type: ignore[arg-type]
        return base_obstacle(base)
    return None


@constant
def _is_within_attention(kind: type) -> bool:
    # Part by part, since this is asked at every call.
    return (
        kind.__qualname__ == "NonDynamicallyQuantizableLinear"
        and kind.__module__ == "torch.nn.modules.linear"
    )


def base_obstacle(base: nn.Module) -> str | None:
    """Why a base layer's own forward must run; None where the fused op may stand for it."""
    return linear_obstacle(base) or ("it has hooks" if has_hooks(base) else None)


def adapter_obstacle(layer: Any, parts: AdapterParts) -> str | None:
    """Why one adapter of a layer runs PEFT's own forward, however its parameters are held; None where it runs
    fused."""
    name, lora_a, lora_b, dropout, scaling = parts.name, parts.a, parts.b, parts.dropout, parts.scaling
    if name in layer.lora_variant:
        return f"adapter {name!r} is a variant ({type(layer.lora_variant[name]).__name__})"
    reason = _kinds_obstacle(name, type(lora_a), type(lora_b), type(dropout))
    if reason is not None:
        return reason
    if dropout.__dict__.get("inplace"):
        return f"adapter {name!r} drops out in place"
    if lora_a._parameters["bias"] is not None:
        return f"adapter {name!r} has a bias in A"
    a, b = lora_a._parameters.get("weight"), lora_b._parameters.get("weight")
    if a is None or b is None:
        return f"adapter {name!r} holds a {type(a).__name__} and a {type(b).__name__}, not plain Parameters"
    if is_partitioned(a) or is_partitioned(b):
        return f"adapter {name!r} holds partitioned parameters (ZeRO-3)"
    if a.dtype != b.dtype:
        return f"adapter {name!r} has A in {a.dtype} and B in {b.dtype}"
    if not isinstance(scaling, (int, float)) and not (type(scaling) is Tensor and scaling.dim() == 0):
        return f"adapter {name!r} has a {type(scaling).__name__} as scaling, not one number"
    for part in (lora_a, lora_b, dropout):
        if has_hooks(part):
            what = f"a {type(part).__name__} whose forward is overridden on the instance"
            return f"adapter {name!r} has {what if 'forward' in part.__dict__ else 'hooks'}"
    return None


@constant
def _kinds_obstacle(name: str, a: type, b: type, dropout: type) -> str | None:
    if a is not nn.Linear or b is not nn.Linear:
        return f"adapter {name!r} holds a {a.__name__} and a {b.__name__}"
    if dropout not in (nn.Dropout, nn.Identity):
        return f"adapter {name!r} drops out by a {dropout.__name__}"
    return None


@constant
def _hooks_on_every_module() -> bool:
    """A trace takes the hooks that there are; torch.compile does not look for others later."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def dtype_obstacle(layer: Any, parts: AdapterParts) -> str | None:
    """Why the op does not take an adapter beside the weight of a plain base layer; None where it does."""
    weight, a = held_weight(_part(layer, "base_layer")), held_weight(parts.a)
    if a.dtype != weight.dtype:
        if a.dtype != torch.float32 or weight.dtype not in (torch.bfloat16, torch.float16):
            return f"adapter {parts.name!r} is {a.dtype} on a weight in {weight.dtype}"
        if not getattr(layer, "cast_input_dtype_enabled", True):
            return f"adapter {parts.name!r} is {a.dtype} and its input is not to be cast"
    return None


def parameters_obstacle(layer: Any, parts: AdapterParts, plain_base: bool) -> str | None:
    """Why the op does not take an adapter's parameters as they are held now; None where it does."""
    base = _part(layer, "base_layer")
    a, b = held_weight(parts.a), held_weight(parts.b)
    if plain_base and is_sharded(held_weight(base)):
        from fused_lora import shards

        return shards.obstacle(operand_of(base), a, b, base._parameters["bias"], parts.operands().dropout_p)
    if not is_plain_parameter(type(a)) or not is_plain_parameter(type(b)):
        held = f"a {type(a).__name__} and a {type(b).__name__}"
        return f"adapter {parts.name!r} holds {held}, not plain Parameters"
    return None


def _obstacle_between_calls(layer: Any, parts: AdapterParts) -> str | None:
    plain_base = base_obstacle(layer.base_layer) is None
    reason = adapter_obstacle(layer, parts) or (dtype_obstacle(layer, parts) if plain_base else None)
    if reason or is_gathered(layer.base_layer):  # what FSDP shards between steps is plain again in forward
        return reason
    return parameters_obstacle(layer, parts, plain_base)


# Verdicts are found anew at every call, since any part may have changed.


def _active_adapters(layer: Any, plain_base: bool) -> list[AdapterParts] | str:
    """The active adapters, where the fused op computes with them what PEFT would; else why it does not."""
    if not issubclass(type(layer), FusedAdapters):
        return "it is not fused"
    if layer._disable_adapters:
        return "its adapters are switched off"
    if layer.merged_adapters:
        return "it is merged"
    if _hooks_on_every_module():
        return "there are hooks on every module"
    reason = None if plain_base else alone_obstacle(_part(layer, "base_layer"))
    if reason is not None:
        return f"its base layer: {reason}"
    adapters = _part(layer, "lora_A")._modules
    # As its property active_adapters says, which a compiled layer would look up in each of its classes.
    names = layer._active_adapter
    names = [names] if isinstance(names, str) else names
    active = [AdapterParts(layer, name) for name in names if name in adapters]
    if not active:
        return "no adapter of it is active"
    if plain_base and is_sharded(held_weight(_part(layer, "base_layer"))):
        if len(active) > 1:
            return "several adapters are active beside a sharded weight"
        if active[0].b._parameters["bias"] is not None:
            return f"adapter {active[0].name!r} has a bias (lora_bias) beside a sharded weight"
    for parts in active:
        reason = adapter_obstacle(layer, parts) or parameters_obstacle(layer, parts, plain_base)
        if reason is None and plain_base:
            reason = dtype_obstacle(layer, parts)
        if reason is not None:
            return reason
    return active


def _adapters_of_batch(layer: Any, names: tuple[str, ...]) -> list[AdapterParts]:
    """The adapters that a batch uses here, where the fused op computes what PEFT would; else none."""
    base = _part(layer, "base_layer")
    if layer._disable_adapters or layer.merged_adapters or _hooks_on_every_module():
        return []
    if base_obstacle(base) or is_sharded(held_weight(base)):
        return []
    mixed = [AdapterParts(layer, name) for name in present(names, _part(layer, "lora_A")._modules)]
    for parts in mixed:
        if adapter_obstacle(layer, parts) or parameters_obstacle(layer, parts, plain_base=True):
            return []
        if dtype_obstacle(layer, parts):
            return []
        # PEFT draws a mask for each adapter's rows, if one were to train so.
        plain = parts.operands().dropout_p == 0.0 and not isinstance(parts.scaling, Tensor)
        if not plain or parts.b._parameters["bias"] is not None:
            return []
    return mixed if len({held_weight(parts.a).dtype for parts in mixed}) == 1 else []


def _operands_of(layer: Any, active: list[AdapterParts]) -> Operands | None:
    """What one call of the op takes, where one call of it computes the layer."""
    base, (parts, *others) = _part(layer, "base_layer"), active
    weight, (a, b, scaling, dropout_p) = held_weight(base), parts.operands()
    if others or isinstance(scaling, Tensor) or parts.b._parameters["bias"] is not None:
        return None
    if is_sharded(weight) or is_gathered(base):
        return None
    bias = base._parameters["bias"]
    return Operands(weight, stores_transposed(type(base)), a, b, bias, scaling, dropout_p)


def _operand(base: nn.Module) -> Tensor:
    """The base layer's weight as the op takes it."""
    weight = operand_of(base)
    return autocast_copy(weight) if is_gathered(base) else weight


def _part(module: nn.Module, name: str) -> nn.Module:
    part = module._modules[name]
    assert part is not None
    return part
