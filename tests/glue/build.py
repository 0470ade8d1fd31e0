"""Builds the sources of csrc/torch, those of the CUDA ops among them, a second time: against the torch that
runs the tests, for tensors in the host's memory, with the kernels on the emulated GPU. Loads the result.

Its ops are torch.ops.fused_lora_emulated.*, its module has what fused_lora._C has in a CUDA build.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from build_support import facts
from tests.emulator import native, toolchain

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).parent / "csrc"
DIRECTORY = ROOT / "build" / "glue"
LIBRARY = "fused_lora_emulated"
FACTS = {"torch": torch.__version__, "cuda": "emulated"}


@dataclass(frozen=True)
class Glue:
    module: ModuleType
    set_stream: Callable[[int | None], None]  # of the emulated runtime, as torch's current one


def glue_sources() -> list[Path]:
    """All but what serves real CPU tensors and what asks torch for its CUDA stream."""
    left_out = {*(CSRC / "torch" / "cpu").glob("*.cpp"), CSRC / "torch" / "cuda" / "stream.cpp"}
    layers = [path for layer in ("torch", "composed") for path in (CSRC / layer).rglob("*.cpp")]
    here = [HERE / name for name in ("device_memory.cpp", "no_cpu_kernels.cpp", "run_on_emulator.cpp")]
    return sorted({*layers, *here} - left_out)


def build_kernels() -> Path:
    """The kernels and their host code, against the stand-in for the CUDA runtime."""
    kernels = CSRC / "kernels"
    sources = sorted([*kernels.rglob("*.cu"), *kernels.rglob("*.cpp")])
    return toolchain.compile_launchers(
        [HERE / "real_kernels.cpp", *sources],
        arch="sm_80",
        library=native.build_library(),
        include=[CSRC],
    )


def build_glue(kernels: Path) -> Path:
    """The extension module; what did not change is not compiled again."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    emulator = native.build_library()
    includes = [CSRC, HERE, DIRECTORY]
    system = [
        *cpp_extension.include_paths(),
        sysconfig.get_path("include"),
        *toolchain.find_toolkit().include,
    ]
    flags = [
        "-std=c++20 -O1 -g0 -fPIC -fopenmp -fvisibility=hidden -Wall",
        f"-DFUSED_LORA_CUDA -DFUSED_LORA_LIBRARY={LIBRARY} -DFUSED_LORA_CUDA_KEY=CPU",
        *(f"-I{path}" for path in includes),
        *(f"-isystem {path}" for path in system),
    ]
    objects = {
        source: DIRECTORY / "objects" / source.relative_to(ROOT).with_suffix(".o")
        for source in glue_sources()
    }
    header = DIRECTORY / "precompiled.h"
    libraries = [kernels, emulator]
    library = DIRECTORY / "_C.so"
    compiler = os.environ.get("CXX", "g++")
    torch_libraries = " ".join(f"-L{path}" for path in cpp_extension.library_paths())
    rules = [
        f"cxxflags = {' '.join(flags)}",
        "rule precompile",
        f"  command = {compiler} $cxxflags -x c++-header -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile",
        f"  command = {compiler} $cxxflags -include {header} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -fopenmp {torch_libraries} "
        "-lc10 -ltorch_cpu -ltorch -ltorch_python "
        + " ".join(f"{path} -Wl,-rpath,{path.parent}" for path in libraries),
        f"build {header}.gch: precompile {HERE / 'precompiled.h'}",
        *(f"build {target}: compile {source} | {header}.gch" for source, target in objects.items()),
        f"build {library}: link {' '.join(map(str, objects.values()))} | {' '.join(map(str, libraries))}",
        "",
    ]
    with (DIRECTORY / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        facts.write_header(FACTS, DIRECTORY / "build_facts.h")
        (DIRECTORY / "build.ninja").write_text("\n".join(rules))
        ninja = Path(sys.executable).with_name("ninja")
        done = subprocess.run(
            [str(ninja) if ninja.exists() else "ninja", "-C", str(DIRECTORY)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise native.BuildError(f"the glue does not compile:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return library


@cache
def load() -> Glue:
    native.library()  # whoever looks for the emulator later finds this one
    path = build_glue(build_kernels())
    spec = importlib.util.spec_from_file_location(f"{LIBRARY}._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    set_stream = ctypes.CDLL(str(path)).glue_set_stream
    set_stream.restype, set_stream.argtypes = None, [ctypes.c_void_p]
    return Glue(module, set_stream)
