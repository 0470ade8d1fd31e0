"""Loads launchers with a C interface to them, for ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.emulator import native
from tests.emulator.toolchain import compile_launchers
from tests.kernels.structures import check_sizes

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def load(bridge: str, sources: Iterable[Path], structures: Sequence[type[ctypes.Structure]]) -> ctypes.CDLL:
    """`sources` and tests/kernels/<bridge>, compiled for sm_80; the structs have their sizes in C++."""
    native.library()  # first: the launchers resolve the CUDA runtime's symbols in it
    path = compile_launchers(
        [Path(__file__).with_name(bridge), *sources],
        arch="sm_80",
        library=native.build_library(),
        include=[CSRC],
    )
    library = ctypes.CDLL(str(path))
    check_sizes(library, structures)
    return library
