"""Finds a CUDA toolkit and decides whether the build takes the CUDA sources in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLES = ("CUDA_HOME", "CUDA_PATH")


class BuildError(RuntimeError):
    """A build that cannot be what was asked for. The message says how to mend it."""


@dataclass(frozen=True)
class Toolkit:
    root: Path
    version: str  # "13.0"

    def at_least(self, *version: int) -> bool:
        return tuple(map(int, self.version.split("."))) >= version


@dataclass(frozen=True)
class Decision:
    cuda: bool
    reason: str


def find_toolkit(
    torch_cuda: str | None = None,
    environ: Mapping[str, str] = os.environ,
    site_directories: Sequence[str] | None = None,
) -> Toolkit | None:
    """The system's toolkit, else the one that PyPI's packages put beside torch.

    A system toolkit of another major version than torch_cuda (torch.version.cuda) yields to one from PyPI
    that fits, unless CUDA_HOME or CUDA_PATH asked for it.
    """
    system = find_system_toolkit(environ)
    asked_for = any(environ.get(variable) for variable in VARIABLES)
    if system and (asked_for or torch_cuda is None or major(system.version) == major(torch_cuda)):
        return system
    root = find_pypi_root(site_directories, torch_cuda and major(torch_cuda))
    return toolkit_at(root) if root else system


def find_system_toolkit(environ: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The toolkit of CUDA_HOME or CUDA_PATH, else of the nvcc on PATH, else /usr/local/cuda.

    A directory that CUDA_HOME names and that holds no nvcc is an error, not a reason to look on.
    """
    for variable in VARIABLES:
        if environ.get(variable):
            root = Path(environ[variable])
            if not (root / "bin" / "nvcc").exists():
                raise BuildError(f"{variable}={root} holds no bin/nvcc: correct it or unset it")
            return toolkit_at(root)
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        # nvcc on PATH may be a wrapper script far from its toolkit: it knows itself where it lives.
        top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M)
        if top:
            return toolkit_at(Path(top[1].strip()).resolve())
    default = Path("/usr/local/cuda")
    return toolkit_at(default) if (default / "bin" / "nvcc").exists() else None


def find_pypi_root(
    site_directories: Sequence[str] | None = None, major_version: str | None = None
) -> Path | None:
    """Where nvidia-cuda-nvcc and its companions lie; site_directories stands for sys.path.

    From CUDA 13 on they share one directory with a bin/nvcc, nvidia/cu13. Those of CUDA 12 carry no nvcc.
    """
    for directory in sys.path if site_directories is None else site_directories:
        for nvcc in sorted(Path(directory).glob(f"nvidia/cu{major_version or '*'}/bin/nvcc")):
            return nvcc.parent.parent
    return None


def runtime_library(root: Path) -> Path | None:
    """The libcudart of a toolkit, to link against; None where it has none.

    NVIDIA's own installers add the name that -lcudart looks for, PyPI's packages hold libcudart.so.13 alone.
    """
    for directory in ("lib64", "lib", "targets/x86_64-linux/lib"):
        for library in sorted((root / directory).glob("libcudart.so*")):
            return library
    return None


def decide(torch_cuda: str | None, toolkit: Toolkit | None, force: str | None) -> Decision:
    """Whether to compile the CUDA sources, and why.

    torch_cuda is torch.version.cuda: a machine without a GPU (a container being built) must still get
    its CUDA build, so torch.cuda.is_available() has no say. force is FORCE_CUDA: "1" turns every reason
    against CUDA into an error, "0" turns CUDA off.
    """
    if force not in (None, "", "0", "1"):
        raise BuildError(f"FORCE_CUDA must be 0 or 1, got {force!r}")
    if force == "0":
        return Decision(False, "FORCE_CUDA=0")
    obstacle = _obstacle(torch_cuda, toolkit)
    if obstacle is None:
        assert toolkit is not None
        return Decision(True, f"torch has CUDA {torch_cuda}, toolkit {toolkit.version} at {toolkit.root}")
    if force == "1":
        raise BuildError(f"FORCE_CUDA=1, but {obstacle}")
    return Decision(False, obstacle)


def pypi_packages(cuda: str) -> tuple[str, ...]:
    """What to install from PyPI to have a toolkit of a CUDA version such as "13.0".

    nvcc leaves the others unpinned, and parts of two releases do not work together.
    """
    names = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
    return tuple(f"{name}=={cuda}.*" for name in names)


def major(version: str) -> str:
    return version.split(".")[0]


def _obstacle(torch_cuda: str | None, toolkit: Toolkit | None) -> str | None:
    if not torch_cuda:
        return "torch is a CPU build (torch.version.cuda is None): install a CUDA build of torch"
    if toolkit is None:
        packages = " ".join(f"'{package}'" for package in pypi_packages(torch_cuda))
        from_pypi = f"; or pip install {packages}" if int(major(torch_cuda)) >= 13 else ""
        return (
            f"torch has CUDA {torch_cuda} but no toolkit was found (CUDA_HOME, CUDA_PATH, nvcc on PATH, "
            f"/usr/local/cuda, PyPI's packages): install one or set CUDA_HOME{from_pypi}"
        )
    if major(toolkit.version) != major(torch_cuda):
        return (
            f"torch has CUDA {torch_cuda} and the toolkit at {toolkit.root} is {toolkit.version}: "
            "their major versions must agree, set CUDA_HOME to a matching toolkit"
        )
    return None


def toolkit_at(root: Path) -> Toolkit:
    printed = _output(str(root / "bin" / "nvcc"), "--version")
    release = re.search(r"release (\d+\.\d+)", printed)
    if not release:
        raise BuildError(f"{root}/bin/nvcc --version names no release, it printed: {printed.strip()!r}")
    return Toolkit(root, release[1])


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
