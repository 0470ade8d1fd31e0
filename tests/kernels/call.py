"""Whole calls of the CUDA kernels, planned and launched by the real host code, executed by the emulator.

machine = Machine("a100")
kernels = load()
forward = run_forward(kernels, machine, given, Mode())
backward = run_backward(kernels, machine, dy, forward.h, given, Mode())
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.emulator import Machine, Output
from tests.emulator.cuda_runtime import runtime
from tests.emulator.machine import Buffer, Result
from tests.kernels import bridge
from tests.kernels.structures import (
    DTYPE_OF,
    BackwardCall,
    Device,
    Dropout,
    ForwardCall,
    MatrixView,
    Problem,
)
from tests.operands import F32, Operands

CSRC = Path(__file__).resolve().parents[2] / "csrc"
GRADIENTS = ("x", "lora_a", "lora_b")

# A launcher of call_launcher.cpp, and its arguments but for the stream.
Launcher = Callable[..., int]
Arguments = tuple[Any, ...]
Runner = Callable[[Launcher, Arguments], int]


class Facts(ctypes.Structure):
    _fields_ = (
        ("workspace_bytes", ctypes.c_size_t),
        ("launches", ctypes.c_int),
        ("description", ctypes.c_char * 1024),
    )


@functools.cache
def load() -> ctypes.CDLL:
    """All of csrc/kernels, with call_launcher.cpp's interface."""
    kernels = CSRC / "kernels"
    sources = [*sorted(kernels.rglob("*.cpp")), *sorted(kernels.rglob("*.cu"))]
    return bridge.load("call_launcher.cpp", sources, (ForwardCall, BackwardCall, Device, Facts))


@dataclass(frozen=True)
class Mode:
    round_adapters: bool = False
    allow_tf32: bool = False
    row_adapters: Tensor | None = None  # a RowAdapter for each row, as three int32


@dataclass(frozen=True)
class Run:
    """What a call planned, and what its launches did."""

    result: Result
    planned_launches: int
    workspace_bytes: int
    description: str


@dataclass(frozen=True)
class Forward:
    y: Tensor
    h: Tensor
    run: Run


@dataclass(frozen=True)
class Backward:
    gradients: dict[str, Tensor]  # of those that were asked for
    run: Run


def rank_dtype(given: Operands, mode: Mode) -> torch.dtype:
    """The dtype of h."""
    masters = given.lora_a.dtype == F32 and not mode.round_adapters
    return F32 if masters else given.x.dtype


def run_directly(launch: Launcher, arguments: Arguments) -> int:
    """On the default stream."""
    return launch(*arguments, None)


def run_as_graph(launch: Launcher, arguments: Arguments) -> int:
    """Captured on a stream in the strictest mode, and the graph launched."""
    cuda = runtime()
    stream, graph, executable = (ctypes.c_void_p() for _ in range(3))
    assert cuda.cudaStreamCreate(ctypes.byref(stream)) == 0
    assert cuda.cudaStreamBeginCapture(stream, 0) == 0
    status = launch(*arguments, stream)
    assert cuda.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert cuda.cudaGraphInstantiate(ctypes.byref(executable), graph, 0) == 0
    assert cuda.cudaGraphLaunch(executable, stream) == 0
    return status


def run_forward(
    kernels: ctypes.CDLL,
    machine: Machine,
    given: Operands,
    mode: Mode,
    run_on_stream: Runner = run_directly,
    *,
    base: Tensor | None = None,
    in_place: bool = False,
) -> Forward:
    """x and the matrices as they lie in memory, with whatever strides.

    base: what the frozen layer gave; then weight and bias are not even passed. in_place: it becomes y.
    """
    rows, rank = given.x.shape[0], given.lora_a.shape[0]
    y = torch.empty(rows, given.weight.shape[0], dtype=given.x.dtype)
    h = torch.empty(rows, rank, dtype=rank_dtype(given, mode))
    arrays: dict[str, Any] = {"x": given.x, "lora_a": given.lora_a, "lora_b": given.lora_b}
    if base is None:
        arrays["weight"] = given.weight
        if given.bias is not None:
            arrays["bias"] = given.bias
    elif in_place:
        y = base
    else:
        arrays["base"] = base
    arrays |= {"y": y if in_place else Output(y), "h": Output(h)}

    def call(placed: dict[str, Buffer]) -> ForwardCall:
        return ForwardCall(
            problem=problem_of(given, mode),
            **_views(placed, "x", "weight", "lora_a", "lora_b"),
            bias=_address(placed, "bias"),
            scaling=given.options["scaling"],
            dropout=_dropout(given, placed),
            row_adapters=_address(placed, "row_adapters"),
            base=_address(placed, "y" if in_place else "base"),
            base_stride=0 if base is None else base.stride(0),
            y=placed["y"].pointer,
            h=placed["h"].pointer,
        )

    return Forward(y, h, _run(kernels, machine, given, mode, "forward", arrays, call, run_on_stream))


def run_backward(
    kernels: ctypes.CDLL,
    machine: Machine,
    dy: Tensor,
    h: Tensor,
    given: Operands,
    mode: Mode,
    needs: Sequence[str] = GRADIENTS,
    run_on_stream: Runner = run_directly,
    *,
    frozen: bool = True,
    adds_to: Tensor | None = None,
) -> Backward:
    """The gradients of `needs`. What none of them needs is not even passed.

    frozen: whether dx has the frozen product's part. adds_to: a gradient of x, to which dx is added.
    """
    arrays: dict[str, Any] = {"dy": dy}
    for name, needed_for in (
        ("x", ("lora_a",)),
        ("weight", ("x",)),
        ("lora_a", ("x",)),
        ("lora_b", ("x", "lora_a")),
        ("h", ("lora_b",)),
    ):
        if set(needed_for) & set(needs) and (frozen or name != "weight"):
            arrays[name] = h if name == "h" else getattr(given, name)
    gradients = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in (("x", given.x), ("lora_a", given.lora_a), ("lora_b", given.lora_b))
        if name in needs
    }
    arrays |= {f"d{name}": Output(gradient) for name, gradient in gradients.items()}
    if adds_to is not None:
        arrays["dx"] = gradients["x"].copy_(adds_to)

    def call(placed: dict[str, Buffer]) -> BackwardCall:
        return BackwardCall(
            problem=problem_of(given, mode),
            **_views(placed, "dy", "x", "weight", "lora_a", "lora_b"),
            scaling=given.options["scaling"],
            dropout=_dropout(given, placed),
            adds_to_dx=adds_to is not None,
            **{name: _address(placed, name) for name in ("h", "row_adapters", "dx", "dlora_a", "dlora_b")},
        )

    run = _run(kernels, machine, given, mode, "backward", arrays, call, run_on_stream)
    return Backward(gradients, run)


def problem_of(given: Operands, mode: Mode) -> Problem:
    return Problem(
        rows=given.x.shape[0],
        in_features=given.x.shape[1],
        out_features=given.weight.shape[0],
        rank=given.lora_a.shape[0],
        dtype=DTYPE_OF[given.x.dtype],
        adapter_dtype=DTYPE_OF[given.lora_a.dtype],
        round_adapters=mode.round_adapters,
        allow_tf32=mode.allow_tf32,
    )


def _views(placed: dict[str, Buffer], *names: str) -> dict[str, MatrixView]:
    return {name: MatrixView.of(placed[name]) for name in names if name in placed}


def _address(placed: dict[str, Buffer], name: str) -> int | None:
    return placed[name].pointer if name in placed else None


def _dropout(given: Operands, placed: dict[str, Buffer]) -> Dropout:
    p = given.options["dropout_p"]
    offset = given.options.get("column_offset", 0)
    return Dropout.of(p, placed["seed"].pointer, offset) if p else Dropout.none()


def _run(
    kernels: ctypes.CDLL,
    machine: Machine,
    given: Operands,
    mode: Mode,
    what: str,
    arrays: dict[str, Any],
    make_call: Any,
    run_on_stream: Runner,
) -> Run:
    if "seed" in given.options:
        arrays["seed"] = given.options["seed"]
    if mode.row_adapters is not None:
        arrays["row_adapters"] = mode.row_adapters
    return run_planned(
        kernels, machine, what, arrays, lambda placed: (ctypes.byref(make_call(placed)),), run_on_stream
    )


def run_planned(
    kernels: ctypes.CDLL,
    machine: Machine,
    what: str,
    arrays: dict[str, Any],
    make_calls: Callable[[dict[str, Buffer]], Arguments],
    run_on_stream: Runner = run_directly,
) -> Run:
    """Plans, hands out a workspace that is undefined at first, and launches.

    make_calls: the launcher's first arguments, of the arrays where they were placed.
    """
    plan, launch = getattr(kernels, f"{what}_plan"), getattr(kernels, f"{what}_run")
    device, facts = Device(), Facts()
    with machine.buffers(**arrays) as placed:
        calls = make_calls(placed)
        machine.run(lambda: kernels.device(ctypes.byref(device)))
        plan(*calls, ctypes.byref(device), ctypes.byref(facts))
        workspace = Output(torch.empty(facts.workspace_bytes, dtype=torch.uint8))
        with machine.buffers(workspace=workspace) as extra:
            address = ctypes.c_void_p(extra["workspace"].pointer if facts.workspace_bytes else None)
            launched = (*calls, ctypes.byref(device), address)
            result = machine.run(lambda: run_on_stream(launch, launched))
    assert result.value == 0, f"{what} returned CUDA error {result.value}"
    return Run(result, facts.launches, facts.workspace_bytes, facts.description.decode())
