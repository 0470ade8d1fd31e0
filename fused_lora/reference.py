"""The oracle: the op's equation in plain torch, on any device, differentiable by torch's own autograd.

    y = x Wᵀ + b + h Bᵀ,   h = s · drop(x) Aᵀ

It is what every other path is tested against, and what serves where there is no compiled path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_lora.arguments import (
    MASK_LANES,
    PANEL_ROWS,
    check_add_arguments,
    check_arguments,
    check_mixed_arguments,
    check_packed,
)

_WORD = 0xFFFFFFFF


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    column_offset: int = 0,
) -> Tensor:
    """x: …×in, weight: out×in, lora_a: r×in, lora_b: out×r, bias: out. Returns …×out in x's dtype."""
    # Under autocast torch brings the operands of its own linear together; nothing is to be compared here.
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        check_arguments(x, weight, lora_a, lora_b, bias, dropout_p, seed, column_offset)
    y = F.linear(x, weight, bias)
    delta = lora_delta(
        x, lora_a, lora_b, scaling=scaling, dropout_p=dropout_p, seed=seed, column_offset=column_offset
    )
    return (y + delta).to(y.dtype)


def lora_linear_mixed(
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    adapter_index: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """lora_linear, each row with the adapter of its index; with none where that is negative."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    check_mixed_arguments(
        x, weight, lora_a, lora_b, adapter_index, bias, scaling, dropout_p, seed, dtypes=not autocast
    )
    y = F.linear(x, weight, bias)
    spread = adapter_index.reshape(*adapter_index.shape, *(1,) * (x.dim() - adapter_index.dim()))
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    for i, (a, b, s) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):
        own = spread == i
        # Others' rows are left out before and after: zeros times what is not finite are no zeros.
        x_own = torch.where(own, x, zero)
        delta = lora_delta(x_own, a, b, scaling=s, dropout_p=dropout_p, seed=seed)
        y = torch.where(own, (y + delta).to(y.dtype), y)
    return y


def lora_add(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    column_offset: int = 0,
) -> Tensor:
    """base: …×out, x: …×in, lora_a: r×in, lora_b: out×r. Returns base + delta in base's dtype."""
    return (base + _delta_beside(base, x, lora_a, lora_b, scaling, dropout_p, seed, column_offset)).to(
        base.dtype
    )


def lora_add_(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    column_offset: int = 0,
) -> Tensor:
    """lora_add in place."""
    return base.add_(_delta_beside(base, x, lora_a, lora_b, scaling, dropout_p, seed, column_offset))


def _delta_beside(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    column_offset: int,
) -> Tensor:
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    check_add_arguments(base, x, lora_a, lora_b, dropout_p, seed, column_offset, dtypes=not autocast)
    return lora_delta(
        x, lora_a, lora_b, scaling=scaling, dropout_p=dropout_p, seed=seed, column_offset=column_offset
    )


def plain(weight: Tensor) -> Tensor:
    """A weight as out_features×in_features, which may be given packed."""
    return unpacked(weight) if weight.dim() == 3 else weight


def unpacked(packed: Tensor) -> Tensor:
    """The weight, out×in, of its panels: out/32 × in/u × 32u, u = 1 in float32 and 2 in bfloat16."""
    check_packed(packed)
    panels, steps, width = packed.shape
    together = width // PANEL_ROWS
    tiles = packed.reshape(panels, steps, PANEL_ROWS, together)
    return tiles.permute(0, 2, 1, 3).reshape(panels * PANEL_ROWS, steps * together)


def lora_delta(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    column_offset: int = 0,
) -> Tensor:
    """s · drop(x) Aᵀ Bᵀ in the adapters' dtype: what the adapter adds to the frozen linear. Returns …×out."""
    x_hat = x.to(lora_a.dtype)
    if dropout_p > 0.0:
        assert seed is not None
        _, scale = dropout_rule(dropout_p)
        rows = math.prod(x.shape[:-1])
        mask = dropout_mask(seed, rows, x.shape[-1], dropout_p, column_offset=column_offset)
        x_hat = x_hat * mask.reshape(x.shape) * scale
    h = scaling * F.linear(x_hat, lora_a)
    return F.linear(h, lora_b)


def dropout_rule(p: float) -> tuple[int, float]:
    """(keep, scale): lanes below `keep`, of 65536, are kept; scale = 1 / the kept share, 0 if none is."""
    keep = int((1.0 - p) * 65536.0 + 0.5)
    return keep, 65536.0 / keep if keep else 0.0


def dropout_mask(
    seed: Tensor, rows: int, columns: int, p: float, *, row_offset: int = 0, column_offset: int = 0
) -> Tensor:
    """The keep-mask, bool, rows×columns. csrc/common/dropout.h states the rule that it follows."""
    keep, _ = dropout_rule(p)
    device = seed.device
    row = torch.arange(row_offset, row_offset + rows, device=device)
    first = column_offset // MASK_LANES
    blocks = -(-(column_offset + columns) // MASK_LANES) - first
    block = torch.arange(first, first + blocks, device=device)
    counter = (row[:, None] & _WORD, row[:, None] >> 32, block[None] & _WORD, block[None] >> 32)
    words = philox4x32_10(counter, seed.reshape(()))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    lanes = torch.stack(halves, dim=-1).reshape(rows, blocks * MASK_LANES)
    start = column_offset - first * MASK_LANES
    return lanes[:, start : start + columns] < keep


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11).

    counter: four int64 tensors that broadcast, each holding 32-bit words; key: one int64. Returns four
    int64 tensors of 32-bit words. Products wrap modulo 2^64, and a shift with a mask takes their high word.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ key0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
