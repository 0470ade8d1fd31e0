"""Which GPUs the CUDA sources are compiled for."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from build_support.toolkit import BuildError, Toolkit

# A compute capability as TORCH_CUDA_ARCH_LIST spells it, without "+PTX": (8, 0, ""), (9, 0, "a").
Architecture = tuple[int, int, str]

# cp.async, and mma.sync on bf16 and tf32, begin here.
OLDEST = (8, 0, "")

# Machine code runs on its own major version from its minor one up, so 8.0 serves 8.6 and 8.9 as well, 10.0
# serves 10.3, and 12.0 serves 12.1. The PTX of the oldest is what every other newer GPU compiles for itself:
# the kernels are written for 8.0 and gain nothing from a newer PTX.
DEFAULT = ((8, 0, ""), (9, 0, ""), (10, 0, ""), (12, 0, ""))

# As torch reads them.
NAMES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def choose(
    asked: str | None, local: Sequence[tuple[int, int]], supported: Sequence[Architecture]
) -> tuple[str, str]:
    """(the list as TORCH_CUDA_ARCH_LIST spells it, where it is from).

    asked: TORCH_CUDA_ARCH_LIST as the user set it. local: the compute capabilities of the GPUs at hand.
    supported: what nvcc compiles for. What is older than the kernels need is left out, because containers set
    that variable for every extension alike.
    """
    if asked and asked.strip() and asked.strip() != "native":
        return _from_user(asked, supported), "TORCH_CUDA_ARCH_LIST"
    usable = sorted({(*capability, "") for capability in local if (*capability, "") >= OLDEST})
    if usable:
        return _for_local(usable, supported), "the GPUs at hand"
    chosen = [_spell(it, ptx=it == OLDEST) for it in DEFAULT if it in supported]
    return ";".join(chosen), "no GPU at hand, so the default"


def supported_by(toolkit: Toolkit) -> list[Architecture]:
    """What a toolkit's nvcc compiles for."""
    command = [str(toolkit.root / "bin" / "nvcc"), "--list-gpu-arch"]
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    numbers = [int(number) for number in re.findall(r"^compute_(\d+)$", printed, re.MULTILINE)]
    return [(number // 10, number % 10, "") for number in numbers]


def _from_user(asked: str, supported: Sequence[Architecture]) -> str:
    entries = asked
    for name, expansion in NAMES.items():
        entries = re.sub(rf"\b{name}\b", expansion, entries)
    kept: list[str] = []
    for entry in re.split(r"[;\s,]+", entries.strip("; ,\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={asked!r} holds {entry!r}, neither like 8.0, 9.0a or 12.0+PTX "
                f"nor one of {', '.join(NAMES)}"
            )
        architecture = (int(match[1]), int(match[2]), match[3])
        if architecture < OLDEST:
            continue
        if (*architecture[:2], "") not in supported:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={asked!r} holds {entry!r}, which this nvcc does not know")
        kept.append(_spell(architecture, ptx=bool(match[4])))
    if not kept:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST={asked!r} names nothing that the kernels run on: they need 8.0 or newer. "
            "Add one, or build without CUDA by FORCE_CUDA=0"
        )
    return ";".join(kept)


def _for_local(usable: Sequence[Architecture], supported: Sequence[Architecture]) -> str:
    """A GPU that is newer than nvcc gets the newest PTX that is older than it."""
    chosen = {it: False for it in usable if it in supported}
    for architecture in usable:
        older = [it for it in supported if OLDEST <= it < architecture]
        if architecture not in supported and older:
            chosen[max(older)] = True
    newest = max(chosen)
    return ";".join(_spell(it, ptx=ptx or it == newest) for it, ptx in sorted(chosen.items()))


def _spell(architecture: Architecture, ptx: bool) -> str:
    major, minor, suffix = architecture
    return f"{major}.{minor}{suffix}{'+PTX' if ptx else ''}"
