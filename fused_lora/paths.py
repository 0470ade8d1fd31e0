"""Which implementation computes a call: one op, several paths.

composed    torch's own GEMMs, the low-rank product accumulated in place (C++, fused_lora._C)
reference   the equation in plain torch (fused_lora.reference)
auto        the first of these that can serve the device

A path asked for by name either serves or raises; only "auto" may choose.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fused_lora.binary import BINARY, FusedLoRAWarning

PATHS = ("auto", "composed", "reference")
VARIABLE = "FUSED_LORA_PATH"

# Devices that the compiled ops have implementations for. "meta" is the fakes'.
_COMPILED_DEVICES = ("cpu", "meta")


def _checked(name: str, source: str) -> str:
    if name not in PATHS:
        raise ValueError(f"{source} must be one of {', '.join(PATHS)}, got {name!r}")
    return name


_asked = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)
_warned: set[str] = set()


def obstacle(path: str, device_type: str) -> str | None:
    """Why a path cannot serve tensors of a device type; None where it can."""
    if path == "reference":
        return None
    if BINARY.problem is not None:
        return BINARY.problem
    if device_type not in _COMPILED_DEVICES:
        return f"fused_lora._C has no kernels for {device_type!r} tensors in this version"
    return None


def choose(device_type: str) -> str:
    """The path that serves tensors of a device type: "composed" or "reference"."""
    if _asked == "reference":
        return "reference"
    problem = obstacle("composed", device_type)
    if problem is None:
        return "composed"
    if _asked == "composed":
        raise RuntimeError(f"path 'composed' was asked for, but {problem}")
    if device_type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device_type)
        warnings.warn(
            f"fused_lora computes in plain torch on {device_type}: {problem}", FusedLoRAWarning, stacklevel=3
        )
    return "reference"


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Within this context every call, of every thread, takes the path `name` (one of PATHS)."""
    global _asked
    before, _asked = _asked, _checked(name, "path")
    try:
        yield
    finally:
        _asked = before


def explain(device: torch.device | str = "cpu") -> str:
    """Which path a call on `device` takes now, and why, in one line."""
    device_type = torch.device(device).type
    if _asked != "auto":
        problem = obstacle(_asked, device_type)
        return f"{_asked}: asked for" + (f", but {problem}" if problem else "")
    problem = obstacle("composed", device_type)
    if problem is None:
        return "composed: the fastest path that this version has for " + device_type
    return f"reference: {problem}"
