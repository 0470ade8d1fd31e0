"""The oracles, compiled once for all tests that run them."""

from __future__ import annotations

import ctypes

import pytest

from tests.emulator.native import build_library, library
from tests.emulator.oracles import cutlass


def load_launchers(architecture: str) -> ctypes.CDLL:
    library()  # first: the launchers resolve the CUDA runtime's symbols in it
    return ctypes.CDLL(str(cutlass.compile_gemms(architecture, build_library())))


@pytest.fixture(scope="session")
def launchers():
    """Launchers by architecture, compiled when first asked for."""
    loaded: dict[str, ctypes.CDLL] = {}

    def get(architecture: str) -> ctypes.CDLL:
        if architecture not in loaded:
            loaded[architecture] = load_launchers(architecture)
        return loaded[architecture]

    return get


@pytest.fixture(scope="session")
def triton_kernels(tmp_path_factory):
    """Triton's kernels by (name, architecture)."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.emulator.oracles.triton_kernels import compile_kernels

    return {(k.name, k.arch): k for k in compile_kernels(tmp_path_factory.mktemp("triton"))}
