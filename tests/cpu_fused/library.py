"""The fused CPU kernels of csrc/cpu/fused, built by g++ without torch and called through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_lora import reference

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cpu" / "fused"
OUTPUT = ROOT / "build" / "cpu_fused"
LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")


class _MatrixView(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("row_stride", c_int64), ("column_stride", c_int64))


class _Dropout(ctypes.Structure):
    _fields_ = (("seed", c_uint64), ("keep", c_uint32), ("scale", c_float), ("first_block", c_int64))


class _Problem(ctypes.Structure):
    _fields_ = (
        ("rows", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("rank", c_int64),
        ("dtype", c_int32),
        ("adapter_dtype", c_int32),
        ("round_adapters", ctypes.c_bool),
        ("weight_in_panels", ctypes.c_bool),
        ("y_in_other_dtype", ctypes.c_bool),
    )


class _ForwardCall(ctypes.Structure):
    _fields_ = (
        ("problem", _Problem),
        ("x", _MatrixView),
        ("weight", _MatrixView),
        ("lora_a", _MatrixView),
        ("lora_b", _MatrixView),
        ("bias", c_void_p),
        ("scaling", c_float),
        ("dropout", _Dropout),
        ("base", c_void_p),
        ("base_stride", c_int64),
        ("y", c_void_p),
        ("h", c_void_p),
        ("h_stride", c_int64),
    )


class _BackwardCall(ctypes.Structure):
    _fields_ = (
        ("problem", _Problem),
        ("dy", _MatrixView),
        ("x", _MatrixView),
        ("weight", _MatrixView),
        ("lora_a", _MatrixView),
        ("lora_b", _MatrixView),
        ("h", c_void_p),
        ("h_stride", c_int64),
        ("scaling", c_float),
        ("dropout", _Dropout),
        ("g", c_void_p),
        ("dx", c_void_p),
        ("dlora_a", c_void_p),
        ("dlora_b", c_void_p),
    )


def objects() -> dict[str, Path]:
    """The compiled sources by name; compiles what is older than any source."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    sources = [*SOURCES.glob("*.cpp"), Path(__file__).parent / "c_interface.cpp"]
    headers = [*SOURCES.glob("*.h"), *(ROOT / "csrc" / "common").glob("*.h")]
    newest_header = max(path.stat().st_mtime for path in headers)
    made = {source.stem: OUTPUT / f"{source.stem}.o" for source in sources}

    def compile_one(source: Path) -> None:
        built = made[source.stem]
        needed = max(newest_header, source.stat().st_mtime)
        if not built.exists() or built.stat().st_mtime < needed:
            flags = ("-std=c++20", "-O3", "-g0", "-fPIC", "-Wall", "-Werror", "-fvisibility=hidden")
            command = ["g++", *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(built)]
            subprocess.run(command, check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, sources))
    return made


@cache
def library() -> ctypes.CDLL:
    parts = sorted(objects().values())
    path = OUTPUT / "libcpu_fused.so"
    if not path.exists() or path.stat().st_mtime < max(part.stat().st_mtime for part in parts):
        subprocess.run(["g++", "-shared", "-pthread", "-o", str(path), *map(str, parts)], check=True)
    made = ctypes.CDLL(str(path))
    for structure, size in (
        (_ForwardCall, made.forward_call_bytes()),
        (_BackwardCall, made.backward_call_bytes()),
    ):
        assert ctypes.sizeof(structure) == size, f"{structure.__name__} is not the header's"
    return made


def supported_levels() -> list[str]:
    return [name for index, name in enumerate(LEVELS) if library().level_supported(index)]


def _view(tensor: Tensor) -> _MatrixView:
    return _MatrixView(tensor.data_ptr(), *tensor.stride())


def _dtype(tensor: Tensor) -> int:
    return {torch.float32: 0, torch.bfloat16: 1}[tensor.dtype]


def _dropout(p: float, seed: Tensor | None, column_offset: int) -> _Dropout:
    if p == 0.0:
        return _Dropout(0, 65536, 1.0)
    assert seed is not None
    return _Dropout(int(seed) & (2**64 - 1), *reference.dropout_rule(p), column_offset // 8)


def fits_panels(weight: Tensor) -> bool:
    return bool(library().weight_fits_panels(*map(c_int64, weight.shape)))


def pack(weight: Tensor, threads: int = 1) -> Tensor:
    """The panels of a weight N×K of any strides."""
    panels = torch.full((weight.numel(),), torch.nan, dtype=weight.dtype)
    sizes = map(c_int64, weight.shape)
    view = ctypes.byref(_view(weight))
    library().pack(view, *sizes, _dtype(weight), c_void_p(panels.data_ptr()), threads)
    return panels


def unpack(panels: Tensor, out_features: int, in_features: int, threads: int = 1) -> Tensor:
    weight = torch.full((out_features, in_features), torch.nan, dtype=panels.dtype)
    sizes = map(c_int64, weight.shape)
    given, made = c_void_p(panels.data_ptr()), c_void_p(weight.data_ptr())
    library().unpack(given, *sizes, _dtype(weight), made, threads)
    return weight


class Call:
    """The op on matrices: x: M×K, weight: N×K, lora_a: r×K, lora_b: N×r, bias: N; any strides.

    With panels, those are what the call reads, and of the weight only its shape.
    """

    def __init__(
        self,
        level: str,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        *,
        scaling: float = 1.0,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        round_adapters: bool = False,
        column_offset: int = 0,
        threads: int = 1,
        panels: Tensor | None = None,
    ) -> None:
        self.level, self.threads = LEVELS.index(level), threads
        self.x, self.weight, self.lora_a, self.lora_b, self.bias = x, weight, lora_a, lora_b, bias
        self.scaling, self.dropout = scaling, _dropout(dropout_p, seed, column_offset)
        self.rank_dtype = x.dtype if round_adapters else lora_a.dtype
        dtypes = _dtype(x), _dtype(lora_a)
        self.problem = _Problem(*x.shape, *lora_b.shape, *dtypes, round_adapters, panels is not None)
        self.panels = panels
        self.weight_view = _view(weight) if panels is None else _MatrixView(panels.data_ptr(), 0, 0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(y, h)."""
        (y,), h = forward([self])
        return y, h

    def backward(
        self, dy: Tensor, h: Tensor, needs: tuple[str, ...] = ("x", "lora_a", "lora_b")
    ) -> dict[str, Tensor]:
        (made,) = backward([self], [dy], h, needs)
        return made


def forward(calls: list[Call]) -> tuple[list[Tensor], Tensor]:
    """The calls' y, and their h side by side. All calls are of one x."""
    first = calls[0]
    rows = first.x.shape[0]
    # Not a number: what a kernel leaves unwritten is seen.
    ys = [torch.full((rows, call.weight.shape[0]), torch.nan, dtype=call.x.dtype) for call in calls]
    ranks = [call.lora_a.shape[0] for call in calls]
    h = torch.full((rows, sum(ranks)), torch.nan, dtype=first.rank_dtype)
    described = [
        _ForwardCall(
            call.problem,
            *(_view(call.x), call.weight_view, _view(call.lora_a), _view(call.lora_b)),
            None if call.bias is None else call.bias.data_ptr(),
            *(call.scaling, call.dropout, None, 0),
            *(y.data_ptr(), part.data_ptr(), h.stride(0)),
        )
        for call, y, part in zip(calls, ys, h.split(ranks, dim=1), strict=True)
    ]
    array = (_ForwardCall * len(calls))(*described)
    library().forward(array, c_int64(len(calls)), first.level, first.threads)
    return ys, h


def backward(
    calls: list[Call], dys: list[Tensor], h: Tensor, needs: tuple[str, ...] = ("x", "lora_a", "lora_b")
) -> list[dict[str, Tensor]]:
    """The calls' gradients; that of x, the sum over the calls, is the same tensor in all of them."""
    first = calls[0]

    def empty(like: Tensor) -> Tensor:
        return torch.full(like.shape, torch.nan, dtype=like.dtype)

    dx = empty(first.x)
    described, made, gs = [], [], []
    for call, dy, part in zip(calls, dys, h.split([c.lora_a.shape[0] for c in calls], dim=1), strict=True):
        own = {"x": dx, "lora_a": empty(call.lora_a), "lora_b": empty(call.lora_b)}
        made.append({name: tensor for name, tensor in own.items() if name in needs})
        gs.append(torch.full(part.shape, torch.nan, dtype=call.rank_dtype))
        out = {name: tensor.data_ptr() for name, tensor in made[-1].items()}
        described.append(
            _BackwardCall(
                *(call.problem, _view(dy), _view(call.x), call.weight_view),
                *(_view(call.lora_a), _view(call.lora_b), part.data_ptr(), h.stride(0)),
                *(call.scaling, call.dropout, gs[-1].data_ptr()),
                *(out.get(name) for name in ("x", "lora_a", "lora_b")),
            )
        )
    array = (_BackwardCall * len(calls))(*described)
    library().backward(array, c_int64(len(calls)), first.level, first.threads)
    return made


class _Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *leaves: Tensor) -> Tensor:
        ctx.call = call
        y, ctx.h = call.forward()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ("x", "lora_a", "lora_b")
        wanted = tuple(name for name, need in zip(needs, ctx.needs_input_grad[1:], strict=True) if need)
        made = ctx.call.backward(dy, ctx.h, wanted)
        return None, *(made.get(name) for name in needs)


def op(level: str, threads: int = 1, round_adapters: bool = False, packed: bool = False) -> Any:
    """The op of a level as tests/operands.py calls one, differentiable once in x, A and B."""

    def lora_linear(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        *,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None = None,
    ) -> Tensor:
        call = Call(
            level,
            *(None if t is None else t.detach() for t in (x, weight, lora_a, lora_b, bias)),  # type: ignore[arg-type]
            scaling=scaling,
            dropout_p=dropout_p,
            seed=seed,
            round_adapters=round_adapters,
            threads=threads,
            panels=pack(weight.detach()) if packed else None,
        )
        y: Tensor = _Op.apply(call, x, lora_a, lora_b)  # type: ignore[no-untyped-call]
        return y

    return lora_linear
