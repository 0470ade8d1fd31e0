"""Ways to compute a LoRA linear that others have found, without dropout, written out in torch.

y = x Wᵀ + s (x Aᵀ) Bᵀ with x M×K, W N×K, A r×K, B N×r; all of them save x alone.

addmm    as Unsloth's kernels do: the low-rank product is accumulated into y and dx in place.
RunLoRA  as RunLoRA does (Cherniuk et al., arXiv 2312.03415): the forward and the backward take the order of
         products that counts the fewest flops for the shape; among them W + s B A merged first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.s = s
        return F.linear(x, weight).addmm_(x @ a.t(), b.t(), alpha=s)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        (dy,) = dys
        g = dy @ b
        dx = (dy @ weight).addmm_(g, a, alpha=ctx.s)
        da = torch.empty_like(a).addmm_(g.t(), x, beta=0, alpha=ctx.s)
        db = torch.empty_like(b).addmm_(dy.t(), x @ a.t(), beta=0, alpha=ctx.s)
        return dx, None, da, db, None


@dataclass(frozen=True)
class Order:
    """Which products are formed: of y and of dx the low-rank ones, or W + s B A first; of dA and dB the thin
    ones (g = dy B and h = x Aᵀ), or dyᵀ x, a gradient of W's size, first."""

    merged_y: bool
    merged_dx: bool
    wide_gradients: bool

    def forward_flops(self, m: int, k: int, n: int, r: int) -> int:
        return 2 * m * k * n + 2 * (r * k * n if self.merged_y else m * r * (k + n))

    def backward_flops(self, m: int, k: int, n: int, r: int) -> int:
        g = m * r * n  # formed once, for dx and dA
        dx = m * k * n + (r * k * n if self.merged_dx else m * r * k)
        gradients = m * k * n + 2 * r * k * n if self.wide_gradients else m * r * k + m * r * (k + n)
        needs_g = not (self.merged_dx and self.wide_gradients)
        return 2 * (dx + gradients + (g if needs_g else 0))

    def __str__(self) -> str:
        merged, split = "merged", "low-rank"
        return (
            f"y {merged if self.merged_y else split}, dx {merged if self.merged_dx else split}, "
            f"dA and dB {'by dyᵀx' if self.wide_gradients else split}"
        )


ORDERS = tuple(Order(*choice) for choice in product((False, True), repeat=3))


def best_order(m: int, k: int, n: int, r: int) -> Order:
    return min(ORDERS, key=lambda it: it.forward_flops(m, k, n, r) + it.backward_flops(m, k, n, r))


class _Ordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float, order: Order) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.s, ctx.order = s, order
        if order.merged_y:
            return F.linear(x, torch.addmm(weight, b, a, alpha=s))
        return F.linear(x, weight).addmm_(x @ a.t(), b.t(), alpha=s)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        (dy,), s, order = dys, ctx.s, ctx.order
        g = None if order.merged_dx and order.wide_gradients else dy @ b
        if order.merged_dx:
            dx = dy @ torch.addmm(weight, b, a, alpha=s)
        else:
            dx = (dy @ weight).addmm_(g, a, alpha=s)
        if order.wide_gradients:
            dw = dy.t() @ x
            da, db = (b.t() @ dw).mul_(s), (dw @ a.t()).mul_(s)
        else:
            assert g is not None
            da = torch.empty_like(a).addmm_(g.t(), x, beta=0, alpha=s)
            db = torch.empty_like(b).addmm_(dy.t(), x @ a.t(), beta=0, alpha=s)
        return dx, None, da, db, None, None


class Formulation(nn.Module):
    """A layer that computes by `order`, or by addmm where there is none."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, s: float, order: Order | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.a, self.b, self.s, self.order = nn.Parameter(a), nn.Parameter(b), s, order

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.order is None:
            y = _Addmm.apply(x, self.weight, self.a, self.b, self.s)  # type: ignore[no-untyped-call]
        else:
            y = _Ordered.apply(x, self.weight, self.a, self.b, self.s, self.order)  # type: ignore[no-untyped-call]
        return y
