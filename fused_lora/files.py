"""Adapters in PEFT's own format: adapter_config.json and adapter_model.safetensors.

Keys are base_model.model.<path>.lora_A.weight and ….lora_B.weight; the adapter's name is a matter of the
running process and not of the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.grouping import set_grouped
from fused_lora.layer import LoRALinear, LoRASettings, check_adapter, linear_features, obstacle
from fused_lora.ops import is_sharded
from fused_lora.swap import demand_unmerged, freeze, lora_layers, set_adapter

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")

# Fields of an adapter's configuration that change what it computes, beyond r, alpha and rslora: a file
# that sets one is refused, because to load only its matrices would be to compute something else.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config"),
    *("velora_config", "monteclora_config", "kasa_config"),
)
# Ways to start an adapter that leave the base weights alone. The others take the adapter's start out of
# them, so that on the plain base its matrices compute something else.
_NEUTRAL_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class AdapterFileError(ValueError):
    """An adapter's files that do not hold what they should, or do not fit the model."""


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
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = _gathered(layer.lora_A[adapter_name])
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = _gathered(layer.lora_B[adapter_name])
    config = _config(model, {name: layer.settings[adapter_name] for name, layer in layers.items()}, layers)
    save_file = _safetensors().save_file
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
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    grouped: bool = True,
) -> list[str]:
    """Puts an adapter from PEFT's files on `model`, in place, and makes it the active one.

    Linears that have no adapter yet are adopted, as `add_lora` does; the model is frozen.

    Args:
        trainable: whether the adapter's matrices train.
        dtype: of the matrices in memory; by default as `add_lora` chooses it.
        grouped: compute layers that share an input together (fused_lora.group).

    Returns the paths of the layers that carry it. Raises AdapterFileError, before anything is changed,
    where the files are missing or damaged, ask for what is not supported, or do not fit the model.
    """
    directory = Path(directory)
    check_adapter(adapter_name, dtype)
    demand_unmerged(model, "load an adapter")
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    plan = _plan(model, config, tensors, adapter_name)
    freeze(model)
    for name, (settings, a, b) in plan.items():
        module = model.get_submodule(name)
        layer = module if isinstance(module, LoRALinear) else LoRALinear.adopt(module)
        layer.add_adapter(adapter_name, settings, dtype=dtype)
        _fill(layer.lora_A[adapter_name], a)
        _fill(layer.lora_B[adapter_name], b)
    set_adapter(model, adapter_name)
    for layer in lora_layers(model).values():
        if adapter_name in layer.settings:
            layer.lora_A[adapter_name].requires_grad_(trainable)
            layer.lora_B[adapter_name].requires_grad_(trainable)
    set_grouped(model, grouped)
    return list(plan)


def _gathered(parameter: Tensor) -> Tensor:
    if is_sharded(parameter):
        parameter = parameter.full_tensor()  # type: ignore[attr-defined]
    return parameter.detach().contiguous()


def _fill(parameter: Tensor, tensor: Tensor) -> None:
    if is_sharded(parameter):
        from fused_lora import shards

        tensor = shards.placed_as(tensor, parameter)
    with torch.no_grad():
        parameter.copy_(tensor)


def _plan(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter_name: str
) -> dict[str, tuple[LoRASettings, Tensor, Tensor]]:
    """For each layer: the settings, A and B; all of it checked against the model."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise AdapterFileError(f"{TENSORS}: unexpected tensor {key!r}")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise AdapterFileError(f"{TENSORS}: holds no tensors")
    modules = dict(model.named_modules())
    plan = {}
    for name, pair in pairs.items():
        if len(pair) != 2:
            missing = "B" if "A" in pair else "A"
            raise AdapterFileError(f"{TENSORS}: tensor {_PREFIX}{name}.lora_{missing}.weight is missing")
        if name not in modules:
            raise AdapterFileError(f"{TENSORS}: the model has no module {name!r}")
        module = modules[name]
        if isinstance(module, LoRALinear):
            if adapter_name in module.settings:
                raise ValueError(f"adapter_name: {name} has an adapter {adapter_name!r} already")
        else:
            reason = obstacle(module)
            if reason:
                raise AdapterFileError(f"{TENSORS}: {name} cannot carry an adapter: {reason}")
        a, b = pair["A"], pair["B"]
        in_features, out_features = linear_features(module)
        settings = _settings(config, name)
        r = settings.r
        for tensor, letter, shape in ((a, "A", (r, in_features)), (b, "B", (out_features, r))):
            if tuple(tensor.shape) != shape:
                raise AdapterFileError(
                    f"{TENSORS}: {name}.lora_{letter} must have shape {list(shape)} (r={r} of {CONFIG} and "
                    f"the model's {in_features}→{out_features}), got {list(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise AdapterFileError(f"{TENSORS}: {name}.lora_{letter} holds values that are not finite")
        plan[name] = (settings, a, b)
    for name in _targeted(model, config):
        if name not in pairs:
            raise AdapterFileError(
                f"{TENSORS}: {CONFIG} has {name} in target_modules, and its tensors are missing"
            )
    return plan


def _settings(config: Mapping[str, Any], name: str) -> LoRASettings:
    """A layer's settings by PEFT's rule: the first pattern that fits the end of its path, or the default."""
    values = {"rank_pattern": config["r"], "alpha_pattern": config["lora_alpha"]}
    for field in values:
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"{CONFIG}: {field} must be an object, got {patterns!r}")
        for pattern, value in patterns.items():
            try:
                fits = re.match(rf"(.*\.)?({pattern})$", name)
            except re.error as error:
                raise AdapterFileError(f"{CONFIG}: {field} has a bad pattern {pattern!r}: {error}") from error
            if fits:
                values[field] = value
                break
    r, alpha = values.values()
    try:
        return LoRASettings(r, alpha, config.get("lora_dropout") or 0.0, bool(config.get("use_rslora")))
    except ValueError as error:
        raise AdapterFileError(f"{CONFIG}, for {name}: {error}") from error


def _targeted(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """The linears that the configuration names, by PEFT's rule; none where it narrows the names further."""
    targets = config.get("target_modules")
    narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if not isinstance(targets, (str, list)) or any(config.get(field) for field in narrowed):
        return []
    linears = (n for n, m in model.named_modules() if isinstance(m, LoRALinear) or obstacle(m) is None)
    if isinstance(targets, str):
        return [name for name in linears if re.fullmatch(targets, name)]
    return [name for name in linears if any(name == t or name.endswith("." + t) for t in targets)]


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text())
    except FileNotFoundError:
        raise AdapterFileError(f"{directory} holds no {CONFIG}") from None
    except ValueError as error:
        raise AdapterFileError(f"{directory / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterFileError(f"{CONFIG}: peft_type must be 'LORA', got {kind!r}")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), (int, float)):
            raise AdapterFileError(f"{CONFIG}: {field} must be a number, got {config.get(field)!r}")
    for field in _UNSUPPORTED:
        if config.get(field):
            raise AdapterFileError(f"{CONFIG}: {field}={config[field]!r} is not supported")
    if config.get("init_lora_weights") not in _NEUTRAL_STARTS:
        start = config["init_lora_weights"]
        raise AdapterFileError(
            f"{CONFIG}: init_lora_weights={start!r} is not supported: it changed the base weights. Let PEFT "
            "convert the adapter (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterFileError(f"{CONFIG}: bias={config['bias']!r} is not supported, only 'none'")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    path = directory / TENSORS
    if not path.exists():
        raise AdapterFileError(f"{directory} holds no {TENSORS} (pickled adapters are not read)")
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(path)
    except Exception as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    return tensors


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


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"adapters are kept in safetensors files, and safetensors does not import ({error}): "
            "pip install safetensors"
        ) from error
    return safetensors.torch
