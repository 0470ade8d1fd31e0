"""Which implementation computes a call: one op, several paths.

fused       hand-written kernels, forward and backward (CUDA; on the CPU x86 with AVX2 or AVX-512)
composed    torch's own GEMMs, the low-rank product accumulated in place (C++, fused_lora._C)
reference   the equation in plain torch (fused_lora.reference)
auto        fused or composed, whichever is faster for the shape (fused_lora.choices); reference where there
            is nothing else

A path asked for by name either serves or raises; only "auto" may choose.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fused_lora import choices
from fused_lora.binary import BINARY, FusedLoRAWarning
from fused_lora.tracing import constant

PATHS = ("auto", "fused", "composed", "reference")
VARIABLE = "FUSED_LORA_PATH"
CPU_LEVELS = ("best", "plain", "avx2", "avx512", "avx512_bf16")
CPU_LEVEL_VARIABLE = "FUSED_LORA_CPU_LEVEL"

# Devices that the compiled ops have implementations for in every build. "meta" is the fakes'.
_COMPILED_DEVICES = ("cpu", "meta")
LEAST_CAPABILITY = 80  # 8.0, of the kernels' instructions


def _checked(name: str, source: str) -> str:
    if name not in PATHS:
        raise ValueError(f"{source} must be one of {', '.join(PATHS)}, got {name!r}")
    return name


def _tell_compiled(name: str) -> None:
    """The ops themselves choose between fused and composed, so that traced graphs follow as well."""
    if BINARY.module is not None:
        BINARY.module.set_path(name)


_asked = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)
_warned: set[str] = set()
_tell_compiled(_asked)
_cpu_level = os.environ.get(CPU_LEVEL_VARIABLE, "best")
# Devices on which the compiled ops were found to serve by what is asked for: `choose` again for every call
# would take 1 µs. Another set with another path or level, so that who chose before adds to the old one.
serving: set[torch.device] = set()
if BINARY.module is not None:
    BINARY.module.set_policy(choices.decide)
    try:
        BINARY.module.set_cpu_level(_cpu_level)
    except ValueError as error:
        raise ValueError(f"{CPU_LEVEL_VARIABLE}: {str(error).splitlines()[0]}") from None


def asked() -> str:
    """The path that is asked for at present."""
    return _asked


def obstacle(path: str, device_type: str, index: int | None = None) -> str | None:
    """Why a path cannot serve tensors of a device; None where it can."""
    if path == "reference":
        return None
    if BINARY.problem is not None:
        return BINARY.problem
    if device_type == "cuda":
        if BINARY.facts.get("cuda") != "yes":
            return (
                f"fused_lora._C has no kernels for 'cuda' tensors in this build: {BINARY.facts.get('reason')}"
            )
        # Not while a graph is traced: there the op itself fails where it has to.
        return None if torch.compiler.is_compiling() else _gpu_obstacle(index)
    if device_type not in _COMPILED_DEVICES:
        return f"fused_lora._C has no kernels for {device_type!r} tensors in this version"
    if path == "fused" and device_type == "cpu":
        assert BINARY.module is not None
        return BINARY.module.cpu_obstacle() or None
    return None


@functools.cache
def _gpu_obstacle(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if index is None else index
    assert BINARY.module is not None
    try:
        capability, *_ = BINARY.module.device_figures(index)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if capability < LEAST_CAPABILITY:
        have = f"{capability // 10}.{capability % 10}"
        return f"the kernels need compute capability 8.0, and cuda:{index} has {have}"
    return None


def compiled(device_type: str, index: int | None = None) -> bool:
    """Whether the compiled ops serve tensors of a device, by whichever path; else plain torch does."""
    return _serves(_asked, device_type, index)


def choose(device_type: str, index: int | None = None) -> str:
    """The path that serves tensors of a device: one of PATHS, "auto" where the op chooses for each shape."""
    return _chosen(_asked, device_type, index)


def _serves(asked: str, device_type: str, index: int | None) -> bool:
    if asked == "reference":
        return False
    problem = obstacle("composed", device_type, index)
    if problem is None:
        return True
    if asked != "auto":
        raise RuntimeError(f"path {asked!r} was asked for, but {problem}")
    if device_type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device_type)
        warnings.warn(
            f"fused_lora computes in plain torch on {device_type}: {problem}", FusedLoRAWarning, stacklevel=5
        )
    return False


@constant
def _chosen(asked: str, device_type: str, index: int | None) -> str:
    if not _serves(asked, device_type, index):
        return "reference"
    problem = None if asked == "auto" else obstacle(asked, device_type, index)
    if problem is not None:
        raise RuntimeError(f"path {asked!r} was asked for, but {problem}")
    return asked


@contextmanager
def use_path(name: str) -> Iterator[None]:
    """Within this context every call, of every thread, takes the path `name`: "auto", "fused", "composed" or
    "reference". Raises ValueError for another name; a call that the path cannot serve raises RuntimeError."""
    before = _asked
    _ask_for(_checked(name, "path"))
    try:
        yield
    finally:
        _ask_for(before)


def _ask_for(name: str) -> None:
    global _asked, serving
    _asked, serving = name, set()
    _tell_compiled(name)


@contextmanager
def use_cpu_level(name: str) -> Iterator[None]:
    """Within this context the CPU kernels of every thread use these instructions: "best", "plain", "avx2",
    "avx512" or "avx512_bf16".

    Raises ValueError for another name, and where the processor does not have them.
    """
    if BINARY.module is None:
        raise RuntimeError(f"level {name!r} was asked for, but {BINARY.problem}")
    before = _cpu_level
    _ask_for_level(name)
    try:
        yield
    finally:
        _ask_for_level(before)


def _ask_for_level(name: str) -> None:
    global _cpu_level, serving
    assert BINARY.module is not None
    BINARY.module.set_cpu_level(name)
    _cpu_level, serving = name, set()
