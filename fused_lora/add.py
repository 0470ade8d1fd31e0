"""The adapter alone, added to what a frozen layer gave that computes by itself: a quantised linear, one with
hooks, any module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from fused_lora import paths, reference
from fused_lora.binary import BINARY
from fused_lora.ops import dropout_of

_compiled = BINARY.module


def lora_add(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    column_offset: int = 0,
) -> Tensor:
    """y = base + s · drop(x) Aᵀ Bᵀ, where `base` is what a frozen layer gave for x, by whatever it computes.

    Args:
        base: …×out_features with x's leading dimensions; float32, float64, bfloat16 or float16, whichever of
            them x has.
        x, lora_a, lora_b, scaling, dropout_p, training, seed, column_offset: as `lora_linear` takes them.

    Returns …×out_features in base's dtype, under autocast too: the sum is rounded to it once.

    Raises ValueError and TypeError as `lora_linear` does.

    Gradients go to whichever of base, x, lora_a and lora_b require them; base's is that of the sum. Saved for
    backward: x, h = s · drop(x) Aᵀ (rows×rank) and the seed.
    """
    return _add(False, base, x, lora_a, lora_b, scaling, dropout_p, training, seed, column_offset)


def lora_add_(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    column_offset: int = 0,
) -> Tensor:
    """`lora_add` in place: writes the sum into `base`, and returns base.

    For a base that nobody else reads, its own layer's backward included: torch refuses a backward that would
    read what was overwritten. The kernels write a contiguous base as they go; another is copied into.

    Raises as `lora_add`, and RuntimeError as torch's own in-place operations do: for a leaf that requires a
    gradient, and for a base whose elements overlap each other, x, lora_a or lora_b.
    """
    return _add(True, base, x, lora_a, lora_b, scaling, dropout_p, training, seed, column_offset)


def _add(
    in_place: bool,
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    training: bool,
    seed: Tensor | int | None,
    column_offset: int,
) -> Tensor:
    seed_tensor = None
    if dropout_p != 0.0:
        dropout_p, seed_tensor = dropout_of("lora_add", x, dropout_p, training, seed)
    if _serves(x, base, lora_a, lora_b):
        assert _compiled is not None
        add = _compiled.lora_add_ if in_place else _compiled.lora_add
        y = add(base, x, lora_a, lora_b, scaling, dropout_p, seed_tensor, False, column_offset)
        return base if in_place else y
    of: Any = torch.ops.fused_lora
    if paths.choose(x.device.type, x.device.index) == "reference":
        of = reference
    op = of.lora_add_ if in_place else of.lora_add
    made: Tensor = op(
        base,
        x,
        lora_a,
        lora_b,
        scaling=scaling,
        dropout_p=dropout_p,
        seed=seed_tensor,
        column_offset=column_offset,
    )
    return made


def _serves(x: Tensor, base: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether the compiled op may be called past torch.ops' Python."""
    if torch.compiler.is_compiling() or has_torch_function((x, base, lora_a, lora_b)):
        return False
    serving = paths.serving
    if x.device not in serving:
        if paths.choose(x.device.type, x.device.index) == "reference":
            return False
        serving.add(x.device)
    return True
