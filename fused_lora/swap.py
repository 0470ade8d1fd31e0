"""Adapters on a whole model: put on, taken off, merged, switched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fused_lora.gate import held, swapping
from fused_lora.grouping import set_grouped, ungroup
from fused_lora.layer import LoRALinear, LoRASettings, check_adapter
from fused_lora.mixed_batch import naming
from fused_lora.packed import plain_parameters
from fused_lora.report import Report, Swapped
from fused_lora.targets import Targets, select

# On the model that add_lora was given: the names of the parameters that trained before.
_TRAINED = "_fused_lora_trained"


def add_lora(
    model: nn.Module,
    targets: Targets = "o_proj",
    *,
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    rslora: bool = False,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    grouped: bool = True,
) -> Report:
    """Freezes `model` and puts an adapter on every linear that `targets` names, in place.

    Args:
        targets: the study's names joined by "+" ("o_proj", "o_proj+fc2", "qkv", "fc1", "fc2", "all"), a
            list of path ends, or a regular expression over whole paths (fused_lora.targets).
        r, alpha, dropout, rslora: of the adapter (LoRASettings).
        adapter_name: a second call with another name adds another adapter, which becomes the only one
            that is active and trains; with the same name and other targets it extends the first.
        dtype: of A and B; by default float32 for 16-bit weights, else the weight's own.
        grouped: compute layers that share an input together (fused_lora.group).

    Returns a Report; print it. Raises ValueError for targets that name nothing, before anything changed.
    The layers are changed in place (LoRALinear.adopt): hooks, ties and references to them stay valid.
    """
    settings = LoRASettings(r, alpha, dropout, rslora)
    check_adapter(adapter_name, dtype)
    with swapping(model):
        selection = select(model, targets)
        for name, module in selection.chosen.items():
            if isinstance(module, LoRALinear) and adapter_name in module.settings:
                raise ValueError(f"adapter_name: {name} has an adapter {adapter_name!r} already")
        demand_unmerged(model, "add an adapter")
        freeze(model)
        report = Report(
            f"adapter {adapter_name!r} (r={r}, alpha={alpha:g}, dropout={dropout:g})",
            skipped=selection.skipped,
        )
        for name, module in selection.chosen.items():
            layer = module if isinstance(module, LoRALinear) else LoRALinear.adopt(module)
            layer.add_adapter(adapter_name, settings, dtype=dtype)
            size = layer.lora_A[adapter_name].numel() + layer.lora_B[adapter_name].numel()
            report.swapped.append(Swapped(name, layer.in_features, layer.out_features, size))
        set_adapter(model, adapter_name)
        report.count_parameters(model)
        report.groups = set_grouped(model, grouped)
    return report


def remove_lora(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Gives the model back: plain linears, the very same modules and Parameters, training what trained.

    merge: leave the active adapters in the weights, as new Parameters. Returns `model`.
    """
    with swapping(model):
        layers = lora_layers(model)
        if not layers:
            raise ValueError("model: no layer of it has an adapter")
        if merge:
            _merge_all(layer for layer in layers.values() if not layer.merged)
        else:
            unmerge(model)
        ungroup(model)
        for layer in layers.values():
            layer.release()
        _let_train_what_trained(model)
    return model


def set_adapter(model: nn.Module, adapter_name: str, *, trainable: bool = True) -> None:
    """Makes `adapter_name` the active adapter wherever a layer has it, and the only one that trains; with
    trainable=False, none trains. Layers without it add nothing."""
    with swapping(model):
        layers = _demand(model, adapter_name)
        demand_unmerged(model, "switch adapters")
        for layer in layers.values():
            layer.set_adapter(adapter_name if adapter_name in layer.settings else [])
        train_adapters(model, adapter_name if trainable else [])


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Drops an adapter from every layer that has it. Where it was active, nothing is added from then on.

    The layers stay LoRALinears, also without an adapter: `remove_lora` gives the plain model back.
    """
    with swapping(model):
        layers = _demand(model, adapter_name)
        demand_unmerged(model, "delete an adapter")
        for layer in layers.values():
            if adapter_name in layer.settings:
                layer.delete_adapter(adapter_name)


def merge(model: nn.Module) -> None:
    """Adds every layer's active adapters to its weight; see LoRALinear.merge. All layers or none."""
    with swapping(model):
        _merge_all(_demand(model).values())


def unmerge(model: nn.Module) -> None:
    """Puts every merged layer's own weight back."""
    with swapping(model):
        for layer in _demand(model).values():
            if layer.merged:
                layer.unmerge()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context `model` is the frozen model alone, in every thread: others cannot hold it until
    the end (fused_lora.held). One thread alone has the frozen model by `use_adapters` with None."""
    with swapping(model):
        layers = list(_demand(model).values())
        demand_unmerged(model, "disable its adapters")
        before = [layer.enabled for layer in layers]
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                layer.enabled = own


@contextmanager
def use_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within this context every element of a batch has its own adapter: `names[i]` the i-th one, None none.

        with fused_lora.use_adapters(model, ["french", None, "german", "french"]):
            model(**batch_of_four)

    In one call of the op a layer; layers without an adapter of that name leave its rows as they are. For
    training as for inference: gradients go to every adapter in `names` whose A and B require them
    (`train_adapters` lets several train). Backward belongs into the context as well where activations are
    checkpointed, since a checkpoint computes the forward again.

    The names are this thread's: threads may each have names of their own at a time, and one that has none is
    computed by the active adapters. `model` is held within the context (fused_lora.held).

    The first dimension of what a layer is given must be as long as `names`: generation by beams repeats each
    element, so repeat its name as often.

    Raises ValueError for an empty `names`, KeyError for a name that no layer has, RuntimeError where a layer
    is merged, and in the model's forward ValueError for a batch of another length.
    """
    if isinstance(names, str):
        raise TypeError(
            f"names must be a sequence of names, one for each element of the batch, got {names!r}"
        )
    batch = tuple(names)
    if not batch:
        raise ValueError("names: it is empty; give a name, or None, for each element of the batch")
    with held(model):
        layers = _demand(model).values()
        known = {name for layer in layers for name in layer.settings}
        for name in dict.fromkeys(batch):
            if name is not None and name not in known:
                raise _unknown(name, known)
        if any(layer.merged for layer in layers):
            raise _merged("use several adapters in one batch")
        with naming([layer.names_of_thread() for layer in layers], batch):
            yield


def train_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Lets the adapters of these names train, and no other. Which ones are active is left as it is."""
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        _demand(model, name)
    for layer in _demand(model).values():
        for name in layer.settings:
            layer.lora_A[name].requires_grad_(name in names)
            layer.lora_B[name].requires_grad_(name in names)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinears by path; one that is tied, under its first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def freeze(model: nn.Module) -> None:
    """Lets nothing of the model train but its adapters, and remembers for `remove_lora` what did."""
    if _TRAINED not in vars(model):
        trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        setattr(model, _TRAINED, trained)
    adapters = {part for layer in lora_layers(model).values() for part in (layer.lora_A, layer.lora_B)}
    for module in model.modules():
        if module not in adapters:
            # Without a look at a weight, which would unpack it.
            for parameter in plain_parameters(module).values():
                if parameter is not None:
                    parameter.requires_grad_(False)


def _let_train_what_trained(model: nn.Module) -> None:
    # Each call of add_lora left its note on the model, or the part of it, that it was given.
    seen, trained = set(), set()
    for part in model.modules():
        names = part.__dict__.pop(_TRAINED, None)
        if names is not None:
            for name, parameter in part.named_parameters():
                seen.add(parameter)
                if name in names:
                    trained.add(parameter)
    for parameter in seen:
        parameter.requires_grad_(parameter in trained)


def demand_unmerged(model: nn.Module, action: str) -> None:
    """Raises RuntimeError where a layer is merged: what changes many layers is refused before the first."""
    if any(layer.merged for layer in lora_layers(model).values()):
        raise _merged(action)


def _merged(action: str) -> RuntimeError:
    return RuntimeError(f"model: it is merged; unmerge it before you {action}")


def _unknown(adapter_name: str, known: Iterable[str]) -> KeyError:
    have = ", ".join(map(repr, sorted(known)))
    return KeyError(f"no adapter {adapter_name!r} in this model; it has {have}")


def _merge_all(layers: Iterable[LoRALinear]) -> None:
    done: list[LoRALinear] = []
    try:
        for layer in layers:
            layer.merge()
            if layer.merged:  # one without an active adapter has nothing to merge
                done.append(layer)
    except Exception:
        for layer in done:
            layer.unmerge()
        raise


def _demand(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model: no layer of it has an adapter; add_lora puts them on")
    known = {name for layer in layers.values() for name in layer.settings}
    if adapter_name is not None and adapter_name not in known:
        raise _unknown(adapter_name, known)
    return layers
