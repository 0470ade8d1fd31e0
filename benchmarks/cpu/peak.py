"""The machine's GEMM peak: the fastest that torch has, on shapes that suit it."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu.turns import Side

SIZES = (512, 1024, 2048)
TRIALS = 5


@functools.cache
def peak(dtype: str, threads: int) -> tuple[Side, float]:
    """The fastest candidate and its flops; the number of threads must be set. It takes its turns among the
    sides, so that a share of the peak is of the peak at that moment."""
    assert torch.get_num_threads() == threads
    rates = []
    for side, flops in _candidates(getattr(torch, dtype)):
        with torch.no_grad():
            side.call()
            seconds = statistics.median(_seconds(side) for _ in range(TRIALS))
        rates.append((flops / seconds, side, flops))
    _, side, flops = max(rates, key=lambda rate: rate[0])
    return side, flops


def _seconds(side: Side) -> float:
    began = time.perf_counter()
    side.call()
    return time.perf_counter() - began


def _candidates(dtype: torch.dtype) -> Iterator[tuple[Side, float]]:
    for size in SIZES:
        x, weight = (torch.randn(size, size).to(dtype) for _ in range(2))
        flops = 2.0 * size**3
        shape = f"{size}×{size}×{size}"
        linear = functools.partial(F.linear, x, weight)
        yield Side(linear, torch.no_grad, f"F.linear, {shape}"), flops
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            prepacked = _prepacked(x, weight)
            yield Side(prepacked, torch.no_grad, f"oneDNN, weight prepacked, {shape}"), flops


def _prepacked(x: Tensor, weight: Tensor) -> functools.partial[object]:
    """What torch.compile calls for a frozen linear."""
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    call = torch.ops.mkldnn._linear_pointwise.default
    return functools.partial(call, x, reordered, None, "none", [], "")
