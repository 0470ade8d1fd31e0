"""Finds a CUDA toolkit and decides whether the build takes the CUDA sources in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class BuildError(RuntimeError):
    """A build that cannot be what was asked for. The message says how to mend it."""


@dataclass(frozen=True)
class Toolkit:
    root: Path
    version: str  # "13.0"


@dataclass(frozen=True)
class Decision:
    cuda: bool
    reason: str


def find_toolkit(environ: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The toolkit of CUDA_HOME or CUDA_PATH, else of the nvcc on PATH, else /usr/local/cuda.

    A directory that CUDA_HOME names and that holds no nvcc is an error, not a reason to look on.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            root = Path(environ[variable])
            if not (root / "bin" / "nvcc").exists():
                raise BuildError(f"{variable}={root} holds no bin/nvcc: correct it or unset it")
            return _toolkit_at(root)
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        # nvcc on PATH may be a wrapper script far from its toolkit: it knows itself where it lives.
        top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M)
        if top:
            return _toolkit_at(Path(top[1].strip()).resolve())
    default = Path("/usr/local/cuda")
    return _toolkit_at(default) if (default / "bin" / "nvcc").exists() else None


def decide(
    torch_cuda: str | None, toolkit: Toolkit | None, force: str | None, sources: Sequence[object]
) -> Decision:
    """Whether to compile the CUDA sources, and why.

    torch_cuda is torch.version.cuda: a machine without a GPU (a container being built) must still get
    its CUDA build, so torch.cuda.is_available() has no say. force is FORCE_CUDA: "1" turns every reason
    against CUDA into an error, "0" turns CUDA off.
    """
    if force not in (None, "", "0", "1"):
        raise BuildError(f"FORCE_CUDA must be 0 or 1, got {force!r}")
    if force == "0":
        return Decision(False, "FORCE_CUDA=0")
    obstacle = _obstacle(torch_cuda, toolkit, sources)
    if obstacle is None:
        assert toolkit is not None
        return Decision(True, f"torch has CUDA {torch_cuda}, toolkit {toolkit.version} at {toolkit.root}")
    if force == "1":
        raise BuildError(f"FORCE_CUDA=1, but {obstacle}")
    return Decision(False, obstacle)


def _obstacle(torch_cuda: str | None, toolkit: Toolkit | None, sources: Sequence[object]) -> str | None:
    if not sources:
        return "this version has no CUDA sources"
    if not torch_cuda:
        return "torch is a CPU build (torch.version.cuda is None): install a CUDA build of torch"
    if toolkit is None:
        return (
            f"torch has CUDA {torch_cuda} but no toolkit was found (CUDA_HOME, CUDA_PATH, nvcc on PATH, "
            "/usr/local/cuda): install one or set CUDA_HOME"
        )
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"torch has CUDA {torch_cuda} and the toolkit at {toolkit.root} is {toolkit.version}: "
            "their major versions must agree, set CUDA_HOME to a matching toolkit"
        )
    return None


def _toolkit_at(root: Path) -> Toolkit:
    printed = _output(str(root / "bin" / "nvcc"), "--version")
    release = re.search(r"release (\d+\.\d+)", printed)
    if not release:
        raise BuildError(f"{root}/bin/nvcc --version names no release, it printed: {printed.strip()!r}")
    return Toolkit(root, release[1])


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
