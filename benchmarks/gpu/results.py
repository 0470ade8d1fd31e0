"""What was measured, as rows: medians, and medians of paired ratios with their quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu.sides import FROZEN, FUSED
from benchmarks.shapes import Shape


@dataclass(frozen=True)
class Run:
    """Where and with what the times were taken."""

    device: str
    capability: str
    torch: str
    cuda: str
    peft: str
    fused_lora: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One side on one shape. Its ratios to other sides are of single rounds: their median and quartiles."""

    half: str  # "forward" or "forward + backward"
    shape: Shape
    dtype: str
    dropout: float
    mode: str  # "graph" or "eager"
    side: str
    rounds: int
    microseconds: float
    over_frozen: float
    over_fused: float
    over_fused_low: float
    over_fused_high: float
    tflops: float  # of the frozen products alone, so that sides compare
    gigabytes_per_second: float  # of x, W and y read or written once in each half


def rows(
    half: str, shape: Shape, dtype: str, dropout: float, mode: str, times: Mapping[str, Sequence[float]]
) -> list[Row]:
    """A row for each side that has times."""
    made = []
    halves = 1 if half == "forward" else 2
    m, k, n = shape.rows, shape.in_features, shape.out_features
    element = 4 if dtype == "float32" else 2
    for side, taken in times.items():
        if not taken:
            continue
        median = statistics.median(taken)
        over_fused = paired(taken, times.get(FUSED, ()))
        made.append(
            Row(
                half,
                shape,
                dtype,
                dropout,
                mode,
                side,
                len(taken),
                1e6 * median,
                paired(taken, times.get(FROZEN, ()))[1],
                over_fused[1],
                over_fused[0],
                over_fused[2],
                halves * 2 * m * k * n / median * 1e-12,
                halves * element * (m * k + k * n + m * n) / median * 1e-9,
            )
        )
    return made


def paired(taken: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios; nan where there are no others."""
    ratios = [a / b for a, b in zip(taken, others, strict=bool(others))]
    if not ratios:
        return (float("nan"),) * 3
    if len(ratios) == 1:
        return (ratios[0],) * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high
