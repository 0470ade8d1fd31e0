"""CUTLASS GEMMs with their own host launchers, instantiated in cutlass_sm80.cu and cutlass_sm90.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.emulator.toolchain import compile_launchers, cutlass_include

DIRECTORY = Path(__file__).resolve().parent


class GemmCall(ctypes.Structure):
    """The struct of gemm_call.h, field by field: a launcher's only argument, passed by pointer."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("m", "n", "k", "lda", "ldb", "ldc", "ldd")),
        *((name, ctypes.c_float) for name in ("alpha", "beta")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "c", "d")),
        ("slices", ctypes.c_int),
        ("workspace", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Gemm:
    """One launcher. The layouts are of A (m×k) and B (k×n); C and D (m×n) are row-major."""

    launcher: str
    arch: str
    input: Literal["bf16", "f16"]
    output: Literal["bf16", "f16", "f32"]
    layout_a: Literal["row", "column"]
    layout_b: Literal["row", "column"]
    alignment: int = 8  # elements, see gemm_call.h
    splits_k: bool = False  # takes slices > 1, and has a function <launcher>_workspace


GEMMS = (
    Gemm("cutlass_sm80_bf16_tn", "sm_80", "bf16", "bf16", "row", "column"),
    Gemm("cutlass_sm80_f16_nn", "sm_80", "f16", "f16", "column", "column"),
    Gemm("cutlass_sm80_bf16_nt", "sm_80", "bf16", "f32", "column", "row"),
    Gemm("cutlass_sm80_bf16_tn_align2", "sm_80", "bf16", "bf16", "row", "column", alignment=2),
    Gemm("cutlass_sm80_f16_tn_align1", "sm_80", "f16", "f16", "row", "column", alignment=1),
    Gemm("cutlass_sm80_f16_tn_serial", "sm_80", "f16", "f16", "row", "column", splits_k=True),
    Gemm("cutlass_sm80_bf16_tn_parallel", "sm_80", "bf16", "bf16", "row", "column", splits_k=True),
    Gemm("cutlass_sm90_bf16_tn", "sm_90a", "bf16", "bf16", "row", "column"),
    Gemm("cutlass_sm90_bf16_nt_pingpong", "sm_90a", "bf16", "bf16", "column", "row"),
)

_SOURCES = {"sm_80": DIRECTORY / "cutlass_sm80.cu", "sm_90a": DIRECTORY / "cutlass_sm90.cu"}


def compile_gemms(arch: str, library: Path) -> Path:
    """The launchers for "sm_80" or "sm_90a" as a shared library on the CUDA runtime that library stands for.

    The first time takes a quarter of a minute for sm_80 and three quarters for sm_90a.
    """
    if arch not in _SOURCES:
        raise ValueError(f"arch must be one of {', '.join(_SOURCES)}, got {arch!r}")
    return compile_launchers(
        [_SOURCES[arch]],
        arch=arch,
        library=library,
        include=[cutlass_include()],
        defines=["NDEBUG"],  # CUTLASS asserts in device code, and a call crosses wgmma's pipeline
        options=["--expt-relaxed-constexpr"],
    )
