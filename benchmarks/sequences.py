"""The kernels that a LoRA linear is made of, by PEFT and by us, with the bytes that each must move.

x is M×K, W is N×K, A is r×K, B is N×r, in 16 bits. A kernel moves u·MK + v·MN + w·KN bytes, and terms in r,
which are left out: r is hundreds of times smaller than K and N. Nothing stays in a cache from one kernel to
the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from benchmarks.shapes import Shape

# Who multiplies: the vendor's library, on the device's newest tensor-core instructions; mma.sync, ours; or
# nobody (element-wise kernels).
Engine = Literal["library", "mma.sync", "none"]


@dataclass(frozen=True)
class Kernel:
    """Bytes per element of x, y and W; and how many products of M·K·N, of M·r·K and of M·r·N it forms."""

    name: str
    u: float = 0
    v: float = 0
    w: float = 0
    frozen: int = 0
    low_rank_k: int = 0  # M·r·K
    low_rank_n: int = 0  # M·r·N
    engine: Engine = "none"

    def bytes(self, shape: Shape) -> float:
        m, k, n = shape.rows, shape.in_features, shape.out_features
        return self.u * m * k + self.v * m * n + self.w * k * n

    def flops(self, shape: Shape) -> float:
        m, k, n, r = shape.rows, shape.in_features, shape.out_features, shape.rank
        return 2.0 * m * (self.frozen * k * n + r * (self.low_rank_k * k + self.low_rank_n * n))


@dataclass(frozen=True)
class Sequence:
    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]


_library = partial(Kernel, engine="library")
_ours = partial(Kernel, engine="mma.sync")

_FROZEN_FORWARD = _library("x Wᵀ", u=2, v=2, w=2, frozen=1)
_FROZEN_BACKWARD = _library("dy W", u=2, v=2, w=2, frozen=1)

FROZEN = Sequence("frozen linear", (_FROZEN_FORWARD,), (_FROZEN_BACKWARD,))

_PEFT_FORWARD = (
    _FROZEN_FORWARD,
    _library("S = x Aᵀ", u=2, low_rank_k=1),
    _library("S Bᵀ", v=2, low_rank_n=1),
    Kernel("× scaling", v=4),
    Kernel("add", v=6),
)
_PEFT_BACKWARD = (
    Kernel("s · dy", v=4),
    _library("dB", v=2, low_rank_n=1),
    _library("dS", v=2, low_rank_n=1),
    _library("dA", u=2, low_rank_k=1),
    _library("dS A", u=2, low_rank_k=1),
    _FROZEN_BACKWARD,
    Kernel("add", u=6),
)
PEFT = Sequence("PEFT", _PEFT_FORWARD, _PEFT_BACKWARD)
# Dropout reads x, writes the dropped x and a mask of bytes; its backward reads a gradient and the mask.
PEFT_DROPOUT = Sequence(
    "PEFT, dropout",
    (Kernel("dropout", u=2 + 2 + 1), *_PEFT_FORWARD),
    (*_PEFT_BACKWARD, Kernel("dropout's backward", u=2 + 1 + 2)),
)
# PEFT's default: x is cast to the adapters' float32, which autocast casts back for each linear.
_CASTS_FORWARD = (
    Kernel("x to float32", u=2 + 4),
    Kernel("x to bfloat16", u=4 + 2),
    Kernel("A to bfloat16"),
    Kernel("B to bfloat16"),
)
_CASTS_BACKWARD = (
    Kernel("dx to float32", u=2 + 4),
    Kernel("dx to bfloat16", u=4 + 2),
    Kernel("dA to float32"),
    Kernel("dB to float32"),
)
PEFT_MASTERS = Sequence(
    "PEFT's default (float32 A, B, autocast)",
    (*_CASTS_FORWARD, *_PEFT_FORWARD),
    (*_PEFT_BACKWARD, *_CASTS_BACKWARD),
)
PEFT_MASTERS_DROPOUT = Sequence(
    "PEFT's default, dropout",
    (*_CASTS_FORWARD, Kernel("dropout in float32", u=4 + 4 + 1), *_PEFT_FORWARD),
    (*_PEFT_BACKWARD, *_CASTS_BACKWARD, Kernel("dropout's backward in float32", u=4 + 1 + 4)),
)

# Dropout and the masters' rounding cost no bytes.
FUSED = Sequence(
    "fused",
    (
        _ours("h = s drop(x) Aᵀ", u=2, low_rank_k=1),
        _ours("y = [x | h] [W | B]ᵀ", u=2, v=2, w=2, frozen=1, low_rank_n=1),
    ),
    (
        _ours("g = s dy B, dB = dyᵀ h", v=2, low_rank_n=2),
        _ours("dA = gᵀ drop(x)", u=2, low_rank_k=1),
        _ours("dx = dy W + mask (g A)", u=2, v=2, w=2, frozen=1, low_rank_k=1),
        _ours("sums of dA and dB"),
    ),
)

# csrc/composed/, without dropout, which it masks in copies of its own.
COMPOSED = Sequence(
    "composed",
    (
        _FROZEN_FORWARD,
        _library("h = s x Aᵀ", u=2, low_rank_k=1),
        _library("y += h Bᵀ", v=4, low_rank_n=1),
    ),
    (
        _library("g = s dy B", v=2, low_rank_n=1),
        _FROZEN_BACKWARD,
        _library("dx += g A", u=4, low_rank_k=1),
        _library("dA", u=2, low_rank_k=1),
        _library("dB", v=2, low_rank_n=1),
    ),
)

# Where another computes the frozen product, a quantised layer say: what the adapter alone costs beside it.
ADAPTER = Sequence(
    "fused adapter",
    (FUSED.forward[0], _ours("y = base + h Bᵀ", v=4, low_rank_n=1)),
    (
        *FUSED.backward[:2],
        _ours("dx = mask (g A)", u=2, low_rank_k=1),
        FUSED.backward[-1],
    ),
)


def without_frozen(sequence: Sequence) -> Sequence:
    """What a sequence costs beside the frozen product."""
    forward, backward = (
        tuple(kernel for kernel in half if kernel not in (_FROZEN_FORWARD, _FROZEN_BACKWARD))
        for half in (sequence.forward, sequence.backward)
    )
    return Sequence(f"adapter of {sequence.name}", forward, backward)


PEFT_SEQUENCES = (PEFT, PEFT_DROPOUT, PEFT_MASTERS, PEFT_MASTERS_DROPOUT)


def coefficients(kernels: tuple[Kernel, ...]) -> tuple[float, float, float]:
    """(u, v, w) of a sequence's kernels together."""
    return sum(k.u for k in kernels), sum(k.v for k in kernels), sum(k.w for k in kernels)
