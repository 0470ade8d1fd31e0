"""Kernels for Triton to compile ahead of time: PTX from a second compiler, for the emulator to execute.

Triton lowers these through LLVM, not through nvcc's front end: other idioms for the same instructions,
and on sm_90 wgmma on operands that cp.async brought. Nothing here launches anything or needs a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

ARCHITECTURES = (80, 90)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A kernel parameter: its type as Triton spells it ("*bf16", "i32", "fp32")."""

    name: str
    type: str


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What a launch needs to know.

    parameters are those of the PTX entry, in its order. Triton appends two pointers to what the source
    declares: scratch in global memory that it may ask for (global_scratch_bytes for each CTA), and a
    profiler's buffer, null without one. constants are compiled in and not passed.
    """

    name: str
    arch: str  # "sm_80", "sm_90a"
    ptx: str
    entry: str
    num_warps: int
    shared_bytes: int
    parameters: tuple[Parameter, ...]
    constants: Mapping[str, int]
    global_scratch_bytes: int


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def matmul(
    a_ptr,
    b_ptr,
    c_ptr,
    m,
    n,
    k,
    lda,
    ldb,
    ldc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C = A Bᵀ: A m×k, B n×k and C m×n, row-major. Grid: (⌈m/BLOCK_M⌉, ⌈n/BLOCK_N⌉)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a = a_ptr + rows[:, None] * lda + inner[None, :]
    b = b_ptr + columns[None, :] * ldb + inner[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = start + inner < k
        a_tile = tl.load(a, mask=(rows[:, None] < m) & inside[None, :], other=0.0)
        b_tile = tl.load(b, mask=(columns[None, :] < n) & inside[:, None], other=0.0)
        accumulator = tl.dot(a_tile, b_tile, accumulator)
        a += BLOCK_K
        b += BLOCK_K
    c = c_ptr + rows[:, None] * ldc + columns[None, :]
    tl.store(c, accumulator.to(tl.bfloat16), mask=(rows[:, None] < m) & (columns[None, :] < n))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def softmax(x_ptr, y_ptr, columns, ldx, ldy, BLOCK: tl.constexpr):
    """y = softmax(x) over each row of at most BLOCK columns. Grid: (rows,)."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * ldx + column, mask=column < columns, other=-float("inf")).to(tl.float32)
    numerator = tl.exp(x - tl.max(x, axis=0))
    y = numerator / tl.sum(numerator, axis=0)
    tl.store(y_ptr + row * ldy + column, y.to(tl.bfloat16), mask=column < columns)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def layer_norm(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, columns, ldx, ldy, eps, BLOCK: tl.constexpr
):
    """y = (x − mean) · rstd · weight + bias for rows of any length, whose mean and rstd it stores.

    Grid: (rows,).
    """
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + block
        total += tl.load(x_ptr + row * ldx + column, mask=column < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / columns
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + block
        x = tl.load(x_ptr + row * ldx + column, mask=column < columns, other=0.0).to(tl.float32)
        centred = tl.where(column < columns, x - mean, 0.0)
        squares += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, columns, BLOCK):
        column = start + block
        inside = column < columns
        x = tl.load(x_ptr + row * ldx + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * weight + bias
        tl.store(y_ptr + row * ldy + column, y.to(tl.bfloat16), mask=inside)


@dataclasses.dataclass(frozen=True)
class _Variant:
    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, int]
    divisible: Sequence[str]  # arguments that the caller promises to be multiples of 16
    num_warps: int
    num_stages: int = 1


_MATMUL_TYPES = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*bf16") | dict.fromkeys(
    ("m", "n", "k", "lda", "ldb", "ldc"), "i32"
)
_MATMUL_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
_POINTERS = ("a_ptr", "b_ptr", "c_ptr")

_VARIANTS = (
    # A mask limits the width of a load as an address does: 16-byte cp.async needs a k that is known to
    # be divisible, and any other k is read by elements.
    _Variant("matmul", matmul, _MATMUL_TYPES, _MATMUL_TILE, (*_POINTERS, "k", "lda", "ldb", "ldc"), 4, 3),
    _Variant("matmul_ragged", matmul, _MATMUL_TYPES, _MATMUL_TILE, _POINTERS, 4, 3),
    _Variant(
        "softmax",
        softmax,
        {"x_ptr": "*bf16", "y_ptr": "*bf16", "columns": "i32", "ldx": "i32", "ldy": "i32"},
        {"BLOCK": 1024},
        ("x_ptr", "y_ptr"),
        4,
    ),
    _Variant(
        "layer_norm",
        layer_norm,
        dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), "*bf16")
        | {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "columns": "i32", "ldx": "i32", "ldy": "i32"}
        | {"eps": "fp32"},
        {"BLOCK": 512},
        ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr", "columns", "ldx", "ldy"),
        4,
    ),
)


def compile_kernels(out_dir: Path) -> list[CompiledKernel]:
    """Compiles every kernel for every architecture; keeps the PTX and Triton's cache under out_dir."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(out_dir / "cache")
        compiled = [_compile(variant, arch) for arch in ARCHITECTURES for variant in _VARIANTS]
    for kernel in compiled:
        (out_dir / f"triton_{kernel.name}_{kernel.arch}.ptx").write_text(kernel.ptx)
    return compiled


def _compile(variant: _Variant, arch: int) -> CompiledKernel:
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = triton.compiler.ASTSource(variant.kernel, signature, dict(variant.constants), hints)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    kernel = triton.compile(source, target=target, options=options)
    metadata = kernel.metadata
    passed = [Parameter(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    hidden = [Parameter("global_scratch", "*i8"), Parameter("profile_scratch", "*i8")]
    return CompiledKernel(
        name=variant.name,
        arch=f"sm_{arch}a" if arch >= 90 else f"sm_{arch}",
        ptx=kernel.asm["ptx"],
        entry=metadata.name,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        parameters=(*passed, *hidden),
        constants=variant.constants,
        global_scratch_bytes=metadata.global_scratch_size,
    )
