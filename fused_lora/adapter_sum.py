"""Several adapters on one linear, y = x Wᵀ + b + Σ sᵢ·Bᵢ(Aᵢ dropᵢ(x)), or on what another layer gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora import reference
from fused_lora.add import lora_add, lora_add_
from fused_lora.ops import lora_linear, seed_on


class Adapter(NamedTuple):
    """A: r×in_features, B: out_features×r, s, and the probability of its own dropout (0 in evaluation)."""

    a: Tensor
    b: Tensor
    scaling: float | Tensor  # a tensor: one number, on any device, that is not read on the host
    dropout_p: float = 0.0


def lora_sum(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """x: …×in_features; weight and bias as `lora_linear` takes them; at least one adapter.

    Without dropout the adapters are one of concatenated ranks. With it each draws a mask of its own, in
    their order: then the first shares the op with the linear, and the others are added in plain torch.
    """
    if len(adapters) > 1 and any(adapter.dropout_p for adapter in adapters):
        first, *others = adapters
        y = lora_sum(x, weight, bias, [first])
        total = y
        for other in others:
            total = total + reference.lora_delta(
                x,
                other.a,
                other.b,
                scaling=other.scaling,
                dropout_p=other.dropout_p,
                seed=seed_on(x.device, None) if other.dropout_p else None,
            )
        return total.to(y.dtype)
    a, b, scaling, dropout_p = adapters[0]
    if len(adapters) > 1 or isinstance(scaling, Tensor):
        a, b, scaling = as_one(adapters)
    return lora_linear(x, weight, a, b, bias, scaling=scaling, dropout_p=dropout_p)


def add_sum(base: Tensor, x: Tensor, adapters: Sequence[Adapter], *, in_place: bool) -> Tensor:
    """base + Σ sᵢ·Bᵢ(Aᵢ dropᵢ(x)), in base's dtype. base, x: as `lora_add` takes them. in_place: base may be
    overwritten."""
    if len(adapters) > 1 and any(adapter.dropout_p for adapter in adapters):
        for adapter in adapters:
            base = add_sum(base, x, [adapter], in_place=in_place)
        return base
    a, b, scaling, dropout_p = adapters[0]
    if len(adapters) > 1 or isinstance(scaling, Tensor):
        a, b, scaling = as_one(adapters)
    add = lora_add_ if in_place else lora_add
    return add(base, x, a, b, scaling=scaling, dropout_p=dropout_p)


def as_one(adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) with s·B A = Σ sᵢ·Bᵢ Aᵢ, by concatenated ranks; gradients flow back to each.

    What their scalings differ by goes into B. A product in 16 bits would round B once more, or leave
    float16's range, so it is taken in float32: the op then takes A and B as masters.
    """
    numbers = [adapter.scaling for adapter in adapters if not isinstance(adapter.scaling, Tensor)]
    shared = max(numbers, key=abs) if len(numbers) == len(adapters) else 1.0
    shared = shared or 1.0  # all of them zero
    parts = [
        adapter.b
        if not isinstance(adapter.scaling, Tensor) and adapter.scaling == shared
        else adapter.b.to(torch.promote_types(torch.float32, adapter.b.dtype)) * (adapter.scaling / shared)
        for adapter in adapters
    ]
    b = torch.cat(parts, dim=1)
    return torch.cat([adapter.a for adapter in adapters]).to(b.dtype), b, shared
