"""Finds nvcc and compiles with it: kernels to PTX, launchers to shared libraries.

What was compiled is kept under build/emulator/ and compiled again when anything it was made from has
changed: the options, the toolkit's version, or a file that the compiler read, included headers among them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from build_support.toolkit import find_pypi_root, find_system_toolkit, pypi_packages

CACHE = Path(__file__).resolve().parents[2] / "build" / "emulator"

PYPI_TOOLKIT = pypi_packages("13.0")


class ToolkitMissing(RuntimeError):
    """No nvcc that works. The message says what to install."""


class CompileError(RuntimeError):
    """The compiler or the linker refused. The message quotes it."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    ptxas: Path
    include: tuple[Path, ...]  # of the CUDA runtime and of CCCL
    version: str  # "13.0.88"
    origin: Literal["system", "pypi"]


def find_toolkit(site_directories: Sequence[str] | None = None) -> Toolkit:
    """The system's toolkit as setup.py finds it, else the one that PyPI's packages put in nvidia/cu13.

    site_directories stands for sys.path. Raises ToolkitMissing, and BuildError where CUDA_HOME or CUDA_PATH
    names a directory without nvcc.
    """
    system = find_system_toolkit()
    if system is not None:
        return _describe(system.root, "system")
    root = find_pypi_root(site_directories)
    if root is not None:
        return _describe(root, "pypi")
    raise ToolkitMissing(
        "no nvcc in CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or this Python's packages: install a CUDA "
        "toolkit, or pip install " + " ".join(f"'{package}'" for package in PYPI_TOOLKIT)
    )


def cutlass_include() -> Path:
    """The headers that PyPI's nvidia-cutlass carries. Raises ModuleNotFoundError without it."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("CUTLASS's headers are missing: pip install nvidia-cutlass")
    return Path(package.submodule_search_locations[0]) / "source" / "include"


def compile_ptx(
    source: Path,
    *,
    arch: str = "sm_80",
    include: Sequence[Path] = (),
    defines: Sequence[str] = (),
    options: Sequence[str] = (),
    toolkit: Toolkit | None = None,
) -> Path:
    """The PTX of a .cu file, with line numbers.

    arch is spelled as nvcc does ("sm_80", "sm_90a"), defines are "NAME" or "NAME=VALUE", options are passed
    to nvcc as they are. Raises CompileError with nvcc's output.
    """
    _architecture(arch)
    flags = ["-ptx", "-lineinfo", f"-arch={arch}", *_flags(include, defines, options)]
    return _compile(source, ".ptx", flags, toolkit or _default_toolkit())


def compile_launchers(
    sources: Sequence[Path],
    *,
    arch: str,
    library: Path,
    include: Sequence[Path] = (),
    defines: Sequence[str] = (),
    options: Sequence[str] = (),
    toolkit: Toolkit | None = None,
) -> Path:
    """Host and device code of .cu and .cpp files as a shared library that runs on another CUDA runtime.

    library takes cudart's place and must define every runtime function that the sources call; the result
    finds it by its absolute path. Machine code and PTX for arch lie in the fatbin uncompressed, so that the
    stand-in can read them. The other arguments and the errors are compile_ptx's.
    """
    number = _architecture(arch)
    if isinstance(sources, str | Path) or not sources:
        raise ValueError(f"sources must be a sequence of at least one file, got {sources!r}")
    library = _existing("library", library)
    toolkit = toolkit or _default_toolkit()
    flags = [
        "-c",
        "-cudart=none",
        "-lineinfo",
        "-Xcompiler=-fPIC",
        "--no-compress",
        f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]",
        *_flags(include, defines, options),
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _compile(source, ".o", flags, toolkit), sources))
    # -z defs: a runtime function that the stand-in lacks is named here and not when it is first called.
    link = [
        str(toolkit.nvcc),
        "-shared",
        "-cudart=none",
        "--no-device-link",
        *map(str, objects),
        str(library),
        f"-Xlinker=-rpath={library.parent},-z,defs",
    ]

    def make(output: Path, _: Path) -> list[Path]:
        _run([*link, "-o", str(output)], objects)
        return [*objects, library]

    return _cached(Path(sources[0]).stem, ".so", [*link, toolkit.version], make)


@functools.cache
def _default_toolkit() -> Toolkit:
    return find_toolkit()


def _describe(root: Path, origin: Literal["system", "pypi"]) -> Toolkit:
    """Asks nvcc itself: distributions put the headers in other places than NVIDIA's own packages do."""
    nvcc = root / "bin" / "nvcc"
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    printed = dry_run.stdout + dry_run.stderr
    version = [re.search(rf"-D__CUDACC_VER_{part}__=(\d+)", printed) for part in ("MAJOR", "MINOR", "BUILD")]
    include = re.findall(r'^#\$ (?:SYSTEM_)?INCLUDES=.*?"(?:-I|-isystem" ")([^"]+)"', printed, re.M)
    if not all(version):
        raise ToolkitMissing(f"{nvcc} --dryrun names no version, it printed: {printed.strip()!r}")
    return Toolkit(
        nvcc=nvcc,
        ptxas=root / "bin" / "ptxas",
        include=tuple(Path(directory).resolve() for directory in include),
        version=".".join(part[1] for part in version if part),
        origin=origin,
    )


def _architecture(arch: str) -> str:
    match = re.fullmatch(r"sm_(\d+[af]?)", arch)
    if match is None:
        raise ValueError(f"arch must be spelled as nvcc does, such as sm_80 or sm_90a, got {arch!r}")
    return match[1]


def _existing(name: str, path: Path) -> Path:
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be a file, {path} is none")
    return path


def _flags(include: Sequence[Path], defines: Sequence[str], options: Sequence[str]) -> list[str]:
    for name, value in (("include", include), ("defines", defines), ("options", options)):
        if isinstance(value, str | Path):
            raise TypeError(f"{name} must be a sequence, got the single value {value!r}")
    return [
        *(f"-I{Path(path).resolve()}" for path in include),
        *(f"-D{define}" for define in defines),
        *options,
    ]


def _compile(source: Path, suffix: str, flags: Sequence[str], toolkit: Toolkit) -> Path:
    source = _existing("source", source)

    def run(output: Path, scratch: Path) -> list[Path]:
        dependencies = scratch / "dependencies"
        command = [str(toolkit.nvcc), *flags, "-MD", "-MF", str(dependencies), "-o", str(output), str(source)]
        _run(command, [source])
        return _read_dependencies(dependencies)

    return _cached(source.stem, suffix, [str(source), *flags, toolkit.version], run)


def _run(command: Sequence[str], inputs: Sequence[Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        names = ", ".join(path.name for path in inputs)
        raise CompileError(f"nvcc failed on {names}:\n{(done.stdout + done.stderr).strip()}")


def _read_dependencies(path: Path) -> list[Path]:
    """The files after the colon of the makefile rule that -MD writes."""
    rule = path.read_text().replace("\\\n", " ")
    files = re.findall(r"(?:\\.|\S)+", rule.split(" : ", 1)[1])
    return [Path(re.sub(r"\\(.)", r"\1", name).replace("$$", "$")) for name in files]


def _cached(stem: str, suffix: str, key: Sequence[str], make: Callable[[Path, Path], Sequence[Path]]) -> Path:
    """The file that make(output, scratch directory) writes, made only if the last one is out of date.

    make returns the files it read. Their contents decide, not their times, which a checkout changes.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    output = CACHE / f"{stem}-{digest}{suffix}"
    record = output.with_name(output.name + ".json")
    with _locked(output.with_name(output.name + ".lock")):
        if output.exists() and _is_up_to_date(record):
            return output
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / f"output{suffix}"
            inputs = make(made, Path(scratch))
            new_record = Path(scratch) / "record"
            new_record.write_text(json.dumps({str(path): _digest(path) for path in inputs}, indent=0))
            made.replace(output)
            new_record.replace(record)
    return output


def _is_up_to_date(record: Path) -> bool:
    if not record.exists():
        return False
    inputs = json.loads(record.read_text())
    return all(Path(path).exists() and _digest(Path(path)) == digest for path, digest in inputs.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: workers of a parallel test run want the same file at the same moment."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def missing_packages() -> tuple[str, ...]:
    """What to install from PyPI so that kernels can be compiled here; nothing where a toolkit is found."""
    try:
        find_toolkit()
    except ToolkitMissing:
        return PYPI_TOOLKIT
    return ()
