"""What PEFT's adapter files hold, read and checked whole: of a model, nothing is known here.

Keys are base_model.model.<path>.lora_A.weight and ….lora_B.weight; the adapter's name is a matter of the
running process and not of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.layer import FLOATS, LoRASettings

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")

# Fields of an adapter's configuration that change what it computes, beyond r, alpha and rslora: a file
# that sets one is refused, because to load only its matrices would be to compute something else.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config"),
    *("velora_config", "monteclora_config", "kasa_config"),
)
# Ways to start an adapter that leave the base weights alone. The others take the adapter's start out of
# them, so that on the plain base its matrices compute something else.
_NEUTRAL_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


class AdapterFileError(ValueError):
    """An adapter's files that do not hold what they should, or do not fit the model."""


class Entry(NamedTuple):
    """What the files hold for one layer."""

    settings: LoRASettings
    a: Tensor
    b: Tensor


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The configuration, and for each layer's path what the files hold. Raises AdapterFileError."""
    config = _read_config(directory)
    pairs: dict[str, dict[str, Tensor]] = {}
    # In one order in every process: where the model is sharded, each layer's adapter is a collective.
    for key, tensor in sorted(_read_tensors(directory).items()):
        match = _KEY.fullmatch(key)
        if not match:
            raise AdapterFileError(f"{TENSORS}: unexpected tensor {key!r}")
        name, letter = match.groups()
        if tensor.dtype not in FLOATS:
            raise AdapterFileError(
                f"{TENSORS}: {name}.lora_{letter} must be floating point, got {tensor.dtype}"
            )
        demand_finite(name, letter, tensor)
        pairs.setdefault(name, {})[letter] = tensor
    if not pairs:
        raise AdapterFileError(f"{TENSORS}: holds no tensors")
    for name, pair in pairs.items():
        if len(pair) != 2:
            missing = "B" if "A" in pair else "A"
            raise AdapterFileError(f"{TENSORS}: tensor {PREFIX}{name}.lora_{missing}.weight is missing")
    return config, {
        name: Entry(_settings(config, name), pair["A"], pair["B"]) for name, pair in pairs.items()
    }


def demand_finite(name: str, letter: str, tensor: Tensor, of: str = "") -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        place = (~finite).nonzero()[0].tolist()
        raise AdapterFileError(
            f"{TENSORS}: {name}.lora_{letter}{of} holds values that are not finite: "
            f"{tensor[tuple(place)].item()} at {place}"
        )


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


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text())
    except FileNotFoundError:
        raise AdapterFileError(f"holds no {CONFIG}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterFileError(f"{CONFIG}: peft_type must be 'LORA', got {kind!r}")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), (int, float)) or isinstance(config[field], bool):
            raise AdapterFileError(f"{CONFIG}: {field} must be a number, got {config.get(field)!r}")
    if config.get("use_rslora") not in (None, True, False):
        raise AdapterFileError(f"{CONFIG}: use_rslora must be true or false, got {config['use_rslora']!r}")
    _demand_targets(config.get("target_modules"))
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


def _demand_targets(targets: Any) -> None:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise AdapterFileError(
                f"{CONFIG}: target_modules is a bad pattern {targets!r}: {error}"
            ) from error
    elif targets is not None and not (
        isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    ):
        raise AdapterFileError(
            f"{CONFIG}: target_modules must be names, or a pattern, as text, got {targets!r}"
        )


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    safetensors = safetensors_torch()
    try:
        # Into memory of our own: load_file's tensors lie in the mapped file, and who writes to it would
        # change them after they were checked, or end the process.
        tensors: dict[str, Tensor] = safetensors.load((directory / TENSORS).read_bytes())
    except FileNotFoundError:
        raise AdapterFileError(f"holds no {TENSORS} (pickled adapters are not read)") from None
    except Exception as error:
        raise AdapterFileError(f"{TENSORS} cannot be read: {error}") from error
    return tensors


def safetensors_torch() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"adapters are kept in safetensors files, and safetensors does not import ({error}): "
            "pip install safetensors"
        ) from error
    return safetensors.torch
