"""Calls of one x, planned and launched together by the real host code, executed by the emulator.

group = group_of(kind, shapes, ranks)
forward = run_forward_group(kernels, machine, group, mode)
backward = run_backward_group(kernels, machine, group, forward.hs, mode)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.emulator import Machine, Output
from tests.emulator.machine import Buffer
from tests.kernels.call import (
    GRADIENTS,
    Mode,
    Run,
    Runner,
    problem_of,
    rank_dtype,
    run_directly,
    run_planned,
)
from tests.kernels.cases import Kind, laid_out
from tests.kernels.structures import BackwardCall, Dropout, ForwardCall, MatrixView
from tests.operands import BF16, Operands, operands


@dataclass(frozen=True)
class Group:
    """Projections of one x: each with operands and a dy of its own."""

    x: Tensor
    members: list[Operands]
    dys: list[Tensor]

    @property
    def ranks(self) -> list[int]:
        return [member.lora_a.shape[0] for member in self.members]


@dataclass(frozen=True)
class ForwardGroup:
    ys: list[Tensor]
    hs: list[Tensor]  # as parts of one M×Σr
    run: Run


@dataclass(frozen=True)
class BackwardGroup:
    dx: Tensor
    gradients: list[dict[str, Tensor]]  # of lora_a and lora_b
    run: Run


def group_of(
    kind: Kind,
    rows: int,
    in_features: int,
    sizes: Sequence[tuple[int, int]],
    dropout_p: float = 0.0,
    layout: str = "dense",
) -> Group:
    """sizes: out_features and rank of each. The masks are different ones."""
    members = [
        operands(
            (rows,), in_features, out, rank, kind.dtype, kind.adapters, dropout_p=dropout_p, key=7 * i + rank
        )
        for i, (out, rank) in enumerate(sizes)
    ]
    x = laid_out(members[0].x, layout)
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(rows, out, generator=generator).to(BF16).to(kind.dtype) for out, _ in sizes]
    return Group(x, [replace(member, x=x) for member in members], [laid_out(dy, layout) for dy in dys])


def run_forward_group(
    kernels: ctypes.CDLL,
    machine: Machine,
    group: Group,
    mode: Mode,
    run_on_stream: Runner = run_directly,
) -> ForwardGroup:
    rows = len(group.x)
    ys = [torch.empty(rows, m.weight.shape[0], dtype=group.x.dtype) for m in group.members]
    # Each in memory of its own, for all of it is copied back; at the strides of parts of one M×Σr.
    low = rank_dtype(group.members[0], mode)
    whole = [torch.empty(rows, sum(group.ranks), dtype=low) for _ in ys]
    hs = [h.split(group.ranks, dim=1)[i] for i, h in enumerate(whole)]
    arrays = _arrays(group, ("weight", "lora_a", "lora_b", "bias"))
    for i, y in enumerate(ys):
        arrays[f"y{i}"] = Output(y)
        arrays[f"h{i}"] = Output(hs[i])

    def calls(placed: dict[str, Buffer]) -> Any:
        made = (ForwardCall * len(ys))()
        for i, member in enumerate(group.members):
            made[i] = ForwardCall(
                problem=problem_of(member, mode),
                x=MatrixView.of(placed["x"]),
                **_views(placed, i, ("weight", "lora_a", "lora_b")),
                bias=_pointer(placed, f"bias{i}"),
                scaling=member.options["scaling"],
                dropout=_dropout(member, placed, i),
                y=placed[f"y{i}"].pointer,
                h=placed[f"h{i}"].pointer,
                h_stride=hs[i].stride(0),
            )
        return made, len(ys)

    return ForwardGroup(ys, hs, run_planned(kernels, machine, "forward_group", arrays, calls, run_on_stream))


def run_backward_group(
    kernels: ctypes.CDLL,
    machine: Machine,
    group: Group,
    hs: Sequence[Tensor],
    mode: Mode,
    needs: Sequence[str] = GRADIENTS,
    run_on_stream: Runner = run_directly,
) -> BackwardGroup:
    dx = torch.empty(group.x.shape, dtype=group.x.dtype)
    gradients = [
        {
            name: torch.empty(matrix.shape, dtype=matrix.dtype)
            for name, matrix in (("lora_a", member.lora_a), ("lora_b", member.lora_b))
            if name in needs
        }
        for member in group.members
    ]
    arrays = _arrays(group, ("weight", "lora_a", "lora_b"))
    if "x" in needs:
        arrays["dx"] = Output(dx)
    for i, of_member in enumerate(gradients):
        arrays |= {f"d{name}{i}": Output(gradient) for name, gradient in of_member.items()}
        arrays |= {f"dy{i}": group.dys[i], f"h{i}": hs[i]}

    def calls(placed: dict[str, Buffer]) -> Any:
        made = (BackwardCall * len(gradients))()
        for i, member in enumerate(group.members):
            made[i] = BackwardCall(
                problem=problem_of(member, mode),
                dy=MatrixView.of(placed[f"dy{i}"]),
                x=MatrixView.of(placed["x"]),
                **_views(placed, i, ("weight", "lora_a", "lora_b")),
                h=placed[f"h{i}"].pointer,
                h_stride=hs[i].stride(0),
                scaling=member.options["scaling"],
                dropout=_dropout(member, placed, i),
                dx=_pointer(placed, "dx"),
                **{f"d{name}": _pointer(placed, f"d{name}{i}") for name in GRADIENTS[1:]},
            )
        return made, len(gradients)

    run = run_planned(kernels, machine, "backward_group", arrays, calls, run_on_stream)
    return BackwardGroup(dx, gradients, run)


def _arrays(group: Group, names: Sequence[str]) -> dict[str, Any]:
    arrays: dict[str, Any] = {"x": group.x}
    for i, member in enumerate(group.members):
        arrays |= {f"{name}{i}": getattr(member, name) for name in names if getattr(member, name) is not None}
        if "seed" in member.options:
            arrays[f"seed{i}"] = member.options["seed"]
    return arrays


def _views(placed: dict[str, Buffer], index: int, names: Sequence[str]) -> dict[str, MatrixView]:
    return {name: MatrixView.of(placed[f"{name}{index}"]) for name in names}


def _pointer(placed: dict[str, Buffer], name: str) -> int | None:
    return placed[name].pointer if name in placed else None


def _dropout(member: Operands, placed: dict[str, Buffer], index: int) -> Dropout:
    p = member.options["dropout_p"]
    return Dropout.of(p, placed[f"seed{index}"].pointer) if p else Dropout.none()
