"""PEFT's LoRA layers, computed by the fused op: the same modules, keys and files, another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.gathered import autocast_copy, is_gathered
from fused_lora.grouped import GROUP, Groupable, Operands, compute, has_hooks
from fused_lora.grouping import set_grouped, ungroup
from fused_lora.layer import PLAIN_PARAMETERS, linear_obstacle, operand_of, stores_transposed
from fused_lora.mixed_batch import adapter_index, present
from fused_lora.ops import is_sharded, lora_linear, lora_linear_mixed
from fused_lora.packed import PacksWeight, held_weight
from fused_lora.report import Report, Swapped
from fused_lora.targets import Skipped

try:
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import LoraLayer
except ImportError as error:
    raise ImportError(
        f"fused_lora.fuse works on PEFT models and PEFT does not import ({error}): pip install peft"
    ) from error


class FusedPeftLinear(PeftLinear, PacksWeight, Groupable):  # type: ignore[misc]
    """peft.tuners.lora.Linear with one fused call for the cases that are trained and served most: one active
    plain adapter, neither merged nor disabled; and in a batch of adapter_names several such ones. In every
    other state PEFT's own forward runs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        # What does not fit raises in PEFT's own forward.
        if names is not None and not args and len(kwargs) == 1 and len(names) == len(x):
            batch = tuple(names)
            mixed = self._fusible_mixture(batch)
            if mixed:
                return self._forward_mixed(x, batch, mixed)
        name = self._fusible_adapter()
        if args or kwargs or name is None:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        if GROUP in self.__dict__:
            operands = self._operands_of(name)
            if operands is not None:
                return compute(self, x, operands)
        base, (lora_a, lora_b, dropout) = _part(self, "base_layer"), _adapter(self, name)
        return lora_linear(
            x,
            _operand(base),
            lora_a._parameters["weight"],  # type: ignore[arg-type]
            lora_b._parameters["weight"],  # type: ignore[arg-type]
            base._parameters["bias"],
            scaling=self.scaling[name],
            dropout_p=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
            training=dropout.training,
        )

    def operands(self) -> Operands | None:
        name = self._fusible_adapter()
        return None if name is None else self._operands_of(name)

    def _operands_of(self, name: str) -> Operands | None:
        base, (lora_a, lora_b, dropout) = _part(self, "base_layer"), _adapter(self, name)
        weight = held_weight(base)
        if is_sharded(weight) or is_gathered(base):
            return None
        return Operands(
            weight,
            stores_transposed(type(base)),
            lora_a._parameters["weight"],  # type: ignore[arg-type]
            lora_b._parameters["weight"],  # type: ignore[arg-type]
            base._parameters["bias"],
            self.scaling[name],
            dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
        )

    def _forward_mixed(self, x: Tensor, names: tuple[str, ...], mixed: tuple[str, ...]) -> Tensor:
        base = _part(self, "base_layer")
        lora_a, lora_b = _part(self, "lora_A")._modules, _part(self, "lora_B")._modules
        return lora_linear_mixed(
            x,
            _operand(base),
            [lora_a[name]._parameters["weight"] for name in mixed],  # type: ignore[union-attr, misc]
            [lora_b[name]._parameters["weight"] for name in mixed],  # type: ignore[union-attr, misc]
            adapter_index(names, mixed, x.device),
            base._parameters["bias"],
            scaling=[self.scaling[name] for name in mixed],
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        super().merge(*args, **kwargs)
        self._weight_changed()

    def unmerge(self) -> None:
        super().unmerge()
        self._weight_changed()

    def _weight_changed(self) -> None:
        # PEFT writes through weight.data, past the version counter that casts of the weight are kept by.
        torch.autograd.graph.increment_version(self.get_base_layer().weight)

    def linear_to_pack(self) -> tuple[nn.Module, bool]:
        return self.base_layer, stores_transposed(type(self.base_layer))

    def needs_plain_weight(self) -> str | None:
        if self.merged:
            return "it is merged"
        if self.disable_adapters:
            return "its adapters are switched off"
        return None if self._fusible_adapter() else "its active adapters do not run fused"

    def _fusible_adapter(self) -> str | None:
        """The one active adapter, where the fused op computes what PEFT would; else None."""
        if self.disable_adapters or self.merged or base_obstacle(_part(self, "base_layer")) is not None:
            return None
        adapters = _part(self, "lora_A")._modules
        active: list[str] = [name for name in self.active_adapters if name in adapters]
        if len(active) != 1:
            return None
        (name,) = active
        reason = adapter_obstacle(self, name) or parameters_obstacle(self, name)
        return name if reason is None else None

    def _fusible_mixture(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The adapters that a batch uses here, where the fused op computes what PEFT would; else none."""
        base = _part(self, "base_layer")
        if self.disable_adapters or self.merged or base_obstacle(base) or is_sharded(held_weight(base)):
            return ()
        lora_a, dropouts = _part(self, "lora_A")._modules, _part(self, "lora_dropout")._modules
        mixed = present(names, lora_a)
        dtypes = set()
        for name in mixed:
            # PEFT draws a mask for each adapter's rows, if one were to train so.
            dropout = dropouts[name]
            if type(dropout) is nn.Dropout and dropout.training and dropout.p > 0.0:
                return ()
            if adapter_obstacle(self, name) or parameters_obstacle(self, name):
                return ()
            dtypes.add(held_weight(lora_a[name]).dtype)  # type: ignore[arg-type]
        return mixed if len(dtypes) == 1 else ()


def fuse(model: nn.Module, *, grouped: bool = True) -> Report:
    """Makes the LoRA layers of a PEFT model fused, in place: keys, files and PEFT's methods stay.

    Layers that are not covered keep PEFT's own forward and stand in the report with the reason. Layers
    that PEFT adds later are plain until `fuse` is called again. grouped: compute layers that share an input
    together (fused_lora.group). Raises ValueError for a model without
    LoRA layers. `unfuse` undoes it.
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
        layer.__class__ = FusedPeftLinear
        size = sum(p.numel() for part in (layer.lora_A, layer.lora_B) for p in part.parameters())
        report.swapped.append(Swapped(name, layer.in_features, layer.out_features, size))
    report.count_parameters(model)
    report.groups = set_grouped(model, grouped)
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Gives every fused layer its own class back. Returns `model`."""
    ungroup(model)
    for module in model.modules():
        if isinstance(module, FusedPeftLinear):
            module._weight_changed()  # from here on PEFT may merge unseen
            module.__class__ = PeftLinear
    return model


def layer_obstacle(layer: Any) -> str | None:
    """Why a LoRA layer of PEFT's cannot run fused, whichever adapter is active; None where it can."""
    if type(layer) not in (PeftLinear, FusedPeftLinear):
        return f"a {type(layer).__module__}.{type(layer).__name__} is not PEFT's plain lora.Linear"
    if "forward" in vars(layer):
        return "its forward is overridden on the instance"
    reason = base_obstacle(layer.base_layer)
    if reason:
        return f"its base layer: {reason}"
    reasons = [adapter_obstacle(layer, name) for name in layer.lora_A]
    # What FSDP shards between steps is plain again in forward.
    if not is_gathered(layer.base_layer):
        reasons = [r or parameters_obstacle(layer, n) for n, r in zip(layer.lora_A, reasons, strict=True)]
    if reasons and all(reasons):
        return reasons[0]
    return None


def base_obstacle(base: nn.Module) -> str | None:
    """Why a base layer's own forward must run; None where the fused op may stand for it."""
    return linear_obstacle(base) or ("it has hooks" if has_hooks(base) else None)


def adapter_obstacle(layer: Any, name: str) -> str | None:
    """Why one adapter of a layer runs PEFT's own forward; None where it runs fused."""
    if name in layer.lora_variant:
        return f"adapter {name!r} is a variant ({type(layer.lora_variant[name]).__name__})"
    if layer.lora_bias.get(name):
        return f"adapter {name!r} has a bias (lora_bias)"
    lora_a, lora_b, dropout = _adapter(layer, name)
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"adapter {name!r} holds a {type(lora_a).__name__} and a {type(lora_b).__name__}"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"adapter {name!r} drops out by a {type(dropout).__name__}"
    weight, a = held_weight(_part(layer, "base_layer")), held_weight(lora_a)
    masters = a.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
    if a.dtype != weight.dtype and not masters:
        return f"adapter {name!r} is {a.dtype} on a weight in {weight.dtype}"
    if not isinstance(layer.scaling[name], (int, float)):
        return f"adapter {name!r} has a {type(layer.scaling[name]).__name__} as scaling"
    if has_hooks(lora_a) or has_hooks(lora_b) or has_hooks(dropout):
        return f"adapter {name!r} has hooks"
    return None


def parameters_obstacle(layer: Any, name: str) -> str | None:
    """Why the op does not take a layer's parameters as they are held now; None where it does."""
    base, (lora_a, lora_b, dropout) = _part(layer, "base_layer"), _adapter(layer, name)
    weight, a, b = held_weight(base), held_weight(lora_a), held_weight(lora_b)
    if is_sharded(weight):
        from fused_lora import shards

        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return shards.obstacle(operand_of(base), a, b, base._parameters["bias"], p)
    if type(a) not in PLAIN_PARAMETERS or type(b) not in PLAIN_PARAMETERS:
        return f"adapter {name!r} holds a {type(a).__name__}, not plain Parameters"
    return None


# Verdicts are found anew at every call, since any part may have changed. So the parts are found past
# nn.Module's own lookup, which takes up to 1 µs each.


def _part(module: nn.Module, name: str) -> nn.Module:
    part = module._modules[name]
    assert part is not None
    return part


def _adapter(layer: nn.Module, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """An adapter's A, B and dropout."""
    parts = layer._modules
    return (
        parts["lora_A"]._modules[name],  # type: ignore[union-attr, return-value]
        parts["lora_B"]._modules[name],  # type: ignore[union-attr]
        parts["lora_dropout"]._modules[name],  # type: ignore[union-attr]
    )


def _operand(base: nn.Module) -> Tensor:
    """The base layer's weight as the op takes it."""
    weight = operand_of(base)
    return autocast_copy(weight) if is_gathered(base) else weight
