"""Loads the compiled half, fused_lora._C, if it belongs to the torch that is running.

A binary built against another torch fails with an undefined symbol at best. So its facts are read from
the file that the build wrote beside it, and compared, before it is touched.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

REBUILD = "rebuild it against this torch: pip install --no-build-isolation --force-reinstall --no-deps ."


class FusedLoRAWarning(UserWarning):
    """Something works, by a slower way than was to be expected."""


@dataclass(frozen=True)
class Binary:
    """module is None exactly where problem says why."""

    module: ModuleType | None
    facts: Mapping[str, str]
    problem: str | None


def mismatch(facts: Mapping[str, str], torch_version: str, torch_cuda: str | None) -> str | None:
    """Why a binary with these facts must not be loaded under this torch; None where it may."""
    built, running = facts.get("torch"), torch_version
    if built != running:
        return f"it was built for torch {built} and torch {running} is running; {REBUILD}"
    built_cuda, running_cuda = facts.get("torch_cuda"), torch_cuda or "none"
    if built_cuda != running_cuda:
        return f"it was built for torch's CUDA {built_cuda} and torch has {running_cuda}; {REBUILD}"
    return None


def load(directory: Path) -> Binary:
    """The binary in the package's directory."""
    try:
        facts: dict[str, str] = json.loads((directory / "_build.json").read_text())
    except FileNotFoundError:
        return Binary(
            None, {}, "fused_lora._C is not built: pip install --no-build-isolation . (in a checkout)"
        )
    except (OSError, ValueError) as error:
        return Binary(None, {}, f"the build facts of fused_lora._C cannot be read ({error}); {REBUILD}")
    problem = mismatch(facts, torch.__version__, torch.version.cuda)
    if problem:
        return Binary(None, facts, f"fused_lora._C is not loaded: {problem}")
    try:
        module = importlib.import_module("fused_lora._C")
    except ImportError as error:
        return Binary(None, facts, f"fused_lora._C does not load ({error}); {REBUILD}")
    return Binary(module, module.build_facts(), None)


BINARY = load(Path(__file__).parent)
