"""Builds the emulator's shared library at its first use, and loads it.

The library is test equipment: it is compiled for the processor at hand, into build/emulator, by ninja.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.emulator import toolchain

SOURCES = Path(__file__).parent / "csrc"

# Every rounding is part of what is emulated: no fused multiply-adds but those that are written.
FLAGS = "-std=c++17 -O2 -march=native -ffp-contract=off -fno-math-errno -fPIC -Wall -Wextra"


class BuildError(RuntimeError):
    """The emulator does not compile; the message holds the compiler's output."""


def build_library() -> Path:
    """Brings the library up to date and returns its path; what did not change is not compiled again."""
    directory = toolchain.CACHE / "native"
    directory.mkdir(parents=True, exist_ok=True)
    include = " ".join(f"-isystem {path}" for path in toolchain.find_toolkit().include)
    objects = {
        source: directory / source.relative_to(SOURCES).with_suffix(".o")
        for source in sorted(SOURCES.rglob("*.cpp"))
    }
    library = directory / "libemulator.so"
    rules = [
        f"cxxflags = {FLAGS} -I{SOURCES} {include}",
        "rule compile",
        f"  command = {os.environ.get('CXX', 'g++')} $cxxflags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {os.environ.get('CXX', 'g++')} -shared $in -o $out",
        *(f"build {target}: compile {source}" for source, target in objects.items()),
        f"build {library}: link {' '.join(map(str, objects.values()))}",
        "",
    ]
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "build.ninja").write_text("\n".join(rules))
        ninja = Path(sys.executable).with_name("ninja")
        done = subprocess.run(
            [str(ninja) if ninja.exists() else "ninja", "-C", str(directory)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BuildError(f"the emulator does not compile:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return library


@cache
def library() -> ctypes.CDLL:
    """The emulator, built and loaded; its functions' types are set."""
    lib = ctypes.CDLL(str(build_library()), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    u64, i64, text, raw = ctypes.c_uint64, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
    signatures: dict[str, tuple[object, list[object]]] = {
        "emulator_last_error": (text, []),
        "emulator_set_limit": (ctypes.c_int, [text, i64]),
        "emulator_set_device_name": (None, [text]),
        "emulator_set_setting": (ctypes.c_int, [text, u64]),
        "emulator_allocate": (u64, [u64, text, u64]),
        "emulator_free": (ctypes.c_int, [u64]),
        "emulator_restrict": (ctypes.c_int, [u64, i64, ctypes.c_int, ctypes.c_int, raw, raw]),
        "emulator_write": (ctypes.c_int, [u64, raw, u64]),
        "emulator_read": (ctypes.c_int, [u64, raw, u64]),
        "emulator_fill": (ctypes.c_int, [u64, ctypes.c_uint8, u64]),
        "emulator_set_undefined": (ctypes.c_int, [u64, u64]),
        "emulator_read_undefined": (ctypes.c_int, [u64, raw, u64]),
        "emulator_load": (ctypes.c_int, [text]),
        "emulator_unload": (ctypes.c_int, [ctypes.c_int]),
        "emulator_kernels": (text, [ctypes.c_int]),
        "emulator_kernel": (text, [ctypes.c_int, text]),
        "emulator_variable": (ctypes.c_int, [ctypes.c_int, text, raw, raw]),
        "emulator_launch": (ctypes.c_int, [ctypes.c_int, text, raw, ctypes.c_uint32, raw, u64]),
        "emulator_launches": (ctypes.c_int, []),
        "emulator_clear_launches": (None, []),
        "emulator_launch_record": (text, [ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib
