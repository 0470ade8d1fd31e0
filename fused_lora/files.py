"""Adapters from a model to PEFT's files, and from the files to a model (fused_lora.peft_files)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.gate import swapping
from fused_lora.grouping import set_grouped
from fused_lora.layer import (
    LoRALinear,
    LoRASettings,
    adapter_dtype,
    check_adapter,
    linear_features,
    obstacle,
)
from fused_lora.ops import is_sharded
from fused_lora.packed import held_weight
from fused_lora.peft_files import (
    CONFIG,
    PREFIX,
    TENSORS,
    AdapterFileError,
    Entry,
    demand_finite,
    read,
    safetensors_torch,
)
from fused_lora.swap import demand_unmerged, freeze, lora_layers, set_adapter


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes one adapter of an `add_lora` model to `directory`, for PEFT and for `load_adapter`.

    Files of the same names are replaced, once both new ones are written. Where the adapter is sharded (by
    fully_shard or tensor parallelism) every process calls this, and the one of rank 0 writes.
    """
    layers = {n: layer for n, layer in lora_layers(model).items() if adapter_name in layer.settings}
    if not layers:
        raise KeyError(f"no adapter {adapter_name!r} in this model")
    if "" in layers:
        raise ValueError("model: it is the adapted layer itself, which has no path that a file could name")
    sharded = any(is_sharded(layer.lora_A[adapter_name]) for layer in layers.values())
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _gathered(layer.lora_A[adapter_name])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _gathered(layer.lora_B[adapter_name])
    config = _config(model, {name: layer.settings[adapter_name] for name, layer in layers.items()}, layers)
    save_file = safetensors_torch().save_file
    if sharded and torch.distributed.get_rank() != 0:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Both are written beside their places before either is replaced, so that a failure loses nothing.
    partial = {name: directory / f"{name}.partial" for name in (TENSORS, CONFIG)}
    try:
        save_file(tensors, partial[TENSORS], metadata={"format": "pt"})
        partial[CONFIG].write_text(json.dumps(config, indent=2) + "\n")
        for name, path in partial.items():
            path.replace(directory / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    replace: bool = False,
    activate: bool = True,
    rank: int | None = None,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    grouped: bool = True,
) -> list[str]:
    """Puts an adapter from PEFT's files on `model`, in place, and makes it the active one.

    Linears that have no adapter yet are adopted, as `add_lora` does; the base model is frozen. The files are
    read and checked whole before anything changes; then all layers change within one swap, which threads
    that hold the model see before or after it and never in between (fused_lora.held).

    Args:
        replace: put it in place of the adapter of that name, if there is one. Layers that the files leave out
            lose theirs. Where shapes and dtypes stay, so do the Parameters: compiled models and captured
            graphs go on with the new numbers.
        activate: make it the active adapter; else which are active is left as it is.
        rank: hold the adapter at this rank whatever its own, which must not be larger: A and B are padded
            with zeros, the scaling goes into B, dropout is left out. Another adapter of the same layers then
            takes its place in a compiled model without compiling again. Layers that the files leave out hold
            zeros.
        trainable: whether the adapter's matrices train.
        dtype: of the matrices in memory; by default that of what is replaced, else as `add_lora` chooses it.
        grouped: compute layers that share an input together (fused_lora.group).

    Returns the paths of the layers that the files hold. Raises AdapterFileError, before anything is changed,
    where the files are missing or damaged, ask for what is not supported, or do not fit the model or `rank`.
    """
    directory = Path(directory)
    check_adapter(adapter_name, dtype)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number ≥ 1, got {rank!r}")
    if rank is not None and trainable:
        raise ValueError("trainable: an adapter that is held at another rank (rank=) does not train")
    demand_unmerged(model, "load an adapter")
    try:
        config, entries = read(directory)
        _demand_fits(model, config, entries, adapter_name, replace)
        ready = {
            name: _prepared(model.get_submodule(name), name, adapter_name, entry, rank, dtype)
            for name, entry in entries.items()
        }
        with swapping(model):
            demand_unmerged(model, "load an adapter")
            _demand_fits(model, config, entries, adapter_name, replace)  # other threads' swaps came before
            _put(model, adapter_name, ready, replace, rank)
            if activate:
                set_adapter(model, adapter_name, trainable=trainable)
            _let_train(model, adapter_name, trainable)
            set_grouped(model, grouped)
    except AdapterFileError as error:
        raise AdapterFileError(f"{directory}: {error}") from error.__cause__
    return list(entries)


def _gathered(parameter: Tensor) -> Tensor:
    if is_sharded(parameter):
        parameter = parameter.full_tensor()  # type: ignore[attr-defined]
    return parameter.detach().contiguous()


def _demand_fits(
    model: nn.Module,
    config: Mapping[str, Any],
    entries: Mapping[str, Entry],
    adapter_name: str,
    replace: bool,
) -> None:
    modules = dict(model.named_modules())
    for name, (settings, a, b) in entries.items():
        if name not in modules:
            raise AdapterFileError(f"{TENSORS}: the model has no module {name!r}")
        module = modules[name]
        if isinstance(module, LoRALinear):
            if adapter_name in module.settings and not replace:
                raise ValueError(
                    f"adapter_name: {name} has an adapter {adapter_name!r} already (replace=True puts this "
                    "one in its place)"
                )
        else:
            reason = obstacle(module)
            if reason:
                raise AdapterFileError(f"{TENSORS}: {name} cannot carry an adapter: {reason}")
        in_features, out_features = linear_features(module)
        r = settings.r
        for tensor, letter, shape in ((a, "A", (r, in_features)), (b, "B", (out_features, r))):
            if tuple(tensor.shape) != shape:
                raise AdapterFileError(
                    f"{TENSORS}: {name}.lora_{letter} must have shape {list(shape)} (r={r} of {CONFIG} and "
                    f"the model's {in_features}→{out_features}), got {list(tensor.shape)}"
                )
    targeted = _targeted(model, config)
    if targeted is None:
        return
    for name in targeted:
        if name not in entries:
            raise AdapterFileError(
                f"{TENSORS}: {CONFIG} has {name} in target_modules, and its tensors are missing"
            )
    for name in entries:
        if name not in targeted:
            raise AdapterFileError(
                f"{TENSORS}: holds tensors of {name}, which {CONFIG} does not have in target_modules"
            )


def _targeted(model: nn.Module, config: Mapping[str, Any]) -> list[str] | None:
    """The linears that the configuration names, by PEFT's rule; None where it narrows the names further."""
    targets = config.get("target_modules")
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if targets in (None, "all-linear") or any(config.get(field) for field in narrowed):
        return None
    linears = (n for n, m in model.named_modules() if isinstance(m, LoRALinear) or obstacle(m) is None)
    if isinstance(targets, str):
        return [name for name in linears if re.fullmatch(targets, name)]
    return [name for name in linears if any(name == t or name.endswith("." + t) for t in targets)]


def _prepared(
    module: nn.Module,
    name: str,
    adapter_name: str,
    entry: Entry,
    rank: int | None,
    dtype: torch.dtype | None,
) -> Entry:
    """What the files hold for a layer, as the layer is to hold it."""
    settings, a, b = entry
    weight = held_weight(module)
    if dtype is None and isinstance(module, LoRALinear) and adapter_name in module.settings:
        dtype = module.lora_A[adapter_name].dtype
    dtype = dtype or adapter_dtype(weight)
    if rank is not None:
        if settings.r > rank:
            raise AdapterFileError(f"{CONFIG}: {name} has r={settings.r}, which is more than rank={rank}")
        b = b.to(torch.promote_types(torch.promote_types(b.dtype, dtype), torch.float32)) * settings.scaling
        more = rank - settings.r
        a, b = nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))
        settings = _held_at(rank)
    a, b = a.to(weight.device, dtype), b.to(weight.device, dtype)
    for letter, matrix in (("A", a), ("B", b)):
        demand_finite(name, letter, matrix, f" in {dtype}")
    return Entry(settings, a, b)


def _held_at(rank: int) -> LoRASettings:
    return LoRASettings(rank, alpha=float(rank))  # a scaling of 1


def _put(
    model: nn.Module, adapter_name: str, ready: Mapping[str, Entry], replace: bool, rank: int | None
) -> None:
    freeze(model)
    for name, entry in ready.items():
        module = model.get_submodule(name)
        layer = module if isinstance(module, LoRALinear) else LoRALinear.adopt(module)
        layer.put_adapter(adapter_name, *entry)
    for name, layer in lora_layers(model).items():
        if replace and name not in ready and adapter_name in layer.settings:
            if rank is None:
                layer.delete_adapter(adapter_name)
                continue
            a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            zeros = a.new_zeros(rank, layer.in_features), b.new_zeros(layer.out_features, rank)
            layer.put_adapter(adapter_name, _held_at(rank), *zeros)


def _let_train(model: nn.Module, adapter_name: str, trainable: bool) -> None:
    for layer in lora_layers(model).values():
        if adapter_name in layer.settings:
            layer.lora_A[adapter_name].requires_grad_(trainable)
            layer.lora_B[adapter_name].requires_grad_(trainable)


def _config(
    model: nn.Module, settings: Mapping[str, LoRASettings], layers: Mapping[str, LoRALinear]
) -> dict[str, Any]:
    first = next(iter(settings.values()))
    for name, s in settings.items():
        if (s.rslora, s.dropout) != (first.rslora, first.dropout):
            raise ValueError(f"{name} differs in rslora or dropout, which a file holds once for all layers")
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "rank_pattern": {_whole(name): s.r for name, s in settings.items() if s.r != first.r},
        "alpha_pattern": {_whole(name): s.alpha for name, s in settings.items() if s.alpha != first.alpha},
        "target_modules": _target_names(model, layers),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
    }


def _target_names(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str] | str:
    """The shortest ends of paths that name these layers and, by PEFT's rule, nothing else in the model; one
    pattern of whole paths where no end tells a layer apart."""
    others = [n for n, _ in model.named_modules() if n not in layers]
    names: set[str] = set()
    for path in layers:
        parts = path.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        own = (end for end in ends if not any(o == end or o.endswith("." + end) for o in others))
        name = next(own, None)
        if name is None:
            return "|".join(re.escape(path) for path in layers)
        names.add(name)
    return sorted(names)


def _whole(path: str) -> str:
    """A pattern that fits this path and not another one that ends like it."""
    return "^" + re.escape(path)


def _task_type(model: nn.Module) -> str | None:
    """PEFT's name for what a transformers model does; None for what needs no name to be loaded."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
