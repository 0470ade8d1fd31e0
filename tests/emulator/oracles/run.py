"""Runs the CUTLASS launchers on the emulated machine: operands in, result out."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from tests.emulator.machine import Machine, Output, Result
from tests.emulator.oracles.cutlass import Gemm, GemmCall

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Operands:
    """A (m×k), B (k×n), both as the layout of the GEMM wants them in memory, and the exact product."""

    def __init__(self, gemm: Gemm, m: int, n: int, k: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(rows: int, columns: int, layout: str) -> torch.Tensor:
            shape = (rows, columns) if layout == "row" else (columns, rows)
            return torch.randn(shape, generator=generator).to(DTYPES[gemm.input])

        self.a, self.b = random(m, k, gemm.layout_a), random(k, n, gemm.layout_b)
        a = self.a if gemm.layout_a == "row" else self.a.T
        b = self.b if gemm.layout_b == "row" else self.b.T
        self.exact = a.double() @ b.double()
        self.magnitude = a.double().abs() @ b.double().abs()  # what errors of accumulation are relative to


def run_gemm(
    machine: Machine, launchers: ctypes.CDLL, gemm: Gemm, operands: Operands, *, slices: int = 1
) -> tuple[torch.Tensor, Result]:
    """D = A·B in the output's dtype, and what the launches found and counted. The status must be success."""
    m, n = operands.exact.shape
    k = operands.a.shape[1] if gemm.layout_a == "row" else operands.a.shape[0]
    d = torch.empty(m, n, dtype=DTYPES[gemm.output])
    arrays: dict[str, Any] = {"a": operands.a, "b": operands.b, "d": Output(d)}
    call = GemmCall(
        m=m, n=n, k=k, lda=operands.a.shape[1], ldb=operands.b.shape[1], ldc=n, ldd=n, alpha=1, slices=slices
    )
    launch = getattr(launchers, gemm.launcher)
    if gemm.splits_k:
        size = getattr(launchers, gemm.launcher + "_workspace")
        size.restype = ctypes.c_size_t
        arrays["workspace"] = Output(torch.empty(max(size(ctypes.byref(call)), 1), dtype=torch.uint8))
    with machine.buffers(**arrays) as placed:
        call.a, call.b, call.c, call.d = (placed[name].pointer for name in ("a", "b", "d", "d"))
        if gemm.splits_k:
            call.workspace = placed["workspace"].pointer
        result = machine.run(lambda: launch(ctypes.byref(call)))
    if result.value != 0:
        raise AssertionError(f"{gemm.launcher} returned status {result.value}")
    return d, result
