"""The op as Python callers see it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.overrides import has_torch_function

from fused_lora import paths, reference
from fused_lora.arguments import check_count, check_mask_arguments, check_probability
from fused_lora.binary import BINARY

_compiled = BINARY.module
_lora_linear: Any = getattr(_compiled, "lora_linear", None)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    column_offset: int = 0,
) -> Tensor:
    """A linear layer with a low-rank adapter: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685).

    Args:
        x: …×in_features, any number of leading dimensions; float32, float64, bfloat16 or float16.
        weight: out_features×in_features in x's dtype; any strides. On the CPU, in float32 and bfloat16, also
            packed by torch.ops.fused_lora.pack_weight (3-D): then it is frozen.
        lora_a: rank×in_features, in x's dtype, or float32 masters beside a 16-bit x. Without autocast
            masters mean a low-rank path in float32; under autocast they are rounded to its dtype.
        lora_b: out_features×rank, in lora_a's dtype.
        bias: out_features in x's dtype.
        scaling: s, the adapter's factor (alpha / rank as a rule).
        dropout_p: probability with which the adapter's input is dropped, rounded to a multiple of 2⁻¹⁶.
        training: False turns dropout off.
        seed: of the dropout mask; an int, or one int64 on x's device. By default drawn from torch's own
            generator of that device, so torch.manual_seed governs it and checkpointing repeats it.
        column_offset: where x is some columns of a wider matrix, the first of them, a multiple of 8: the
            dropout mask is then that part of the whole matrix's mask.

    Under tensor parallelism all five tensors are DTensors (fused_lora.shards has the layouts), and so is what
    is returned.

    Returns:
        …×out_features in x's dtype (autocast's, under autocast).

    Raises:
        ValueError: a shape, device or probability that does not fit, by the argument's name.
        TypeError: a dtype that does not fit, by the argument's name.

    Gradients go to whichever of x, weight, lora_a, lora_b and bias require them. Saved for backward: x,
    h = s · drop(x) Aᵀ (rows×rank) and the seed; never a mask, a masked or a cast copy of x.
    """
    if type(weight) is not Parameter and is_sharded(weight):
        from fused_lora import shards

        check_probability("lora_linear", dropout_p, "dropout_p")
        return shards.lora_linear(
            x,
            weight,
            lora_a,
            lora_b,
            bias,
            scaling=scaling,
            dropout_p=dropout_p if training else 0.0,
            seed=seed,
        )
    seed_tensor = None
    if dropout_p != 0.0:
        dropout_p, seed_tensor = dropout_of("lora_linear", x, dropout_p, training, seed)
    plain = not (is_compiling() or has_torch_function((x, weight, lora_a, lora_b)))
    serving = paths.serving
    if not (plain and x.device in serving):
        tensors = lora_a, lora_b, bias
        options: dict[str, Any] = {
            "scaling": scaling,
            "dropout_p": dropout_p,
            "seed": seed_tensor,
            "column_offset": column_offset,
        }
        if paths.choose(x.device.type, x.device.index) == "reference":
            return reference.lora_linear(x, reference.plain(weight), *tensors, **options)
        if not plain:
            y: Tensor = torch.ops.fused_lora.lora_linear(x, weight, *tensors, **options)
            return y
        serving.add(x.device)
    y = _lora_linear(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed_tensor, False, column_offset)
    return y


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
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """`lora_linear` for a batch whose rows belong to different adapters, in one call:

        y[i] = x[i] Wᵀ + b + sⱼ · drop(x[i]) Aⱼᵀ Bⱼᵀ,   j = adapter_index[i]; none where it is negative

    Args:
        lora_a: of each adapter rᵢ×in_features, of any ranks and one dtype, as lora_linear's.
        lora_b: of each adapter out_features×rᵢ.
        adapter_index: int64 on x's device, of x's first dimensions: one for every row, or for every element
            of a batch of sequences. In any order; rows of an adapter that are neighbours are the quickest.
        scaling: sᵢ, of each adapter.
        dropout_p: of all adapters' input, by the mask that lora_linear would draw.

    The others are lora_linear's. The frozen product takes all rows together. An adapter meets its own rows
    alone: numbers of it that are not finite reach no other row. Gradients go to whichever of x, weight, bias
    and every lora_a[i] and lora_b[i] require them; an adapter without rows gets zeros.

    Raises ValueError and TypeError as lora_linear, and on the CPU IndexError for an adapter_index that is
    not below the number of adapters.
    """
    dropout_p, seed_tensor = dropout_of("lora_linear", x, dropout_p, training, seed)
    tensors = lora_a, lora_b, adapter_index, bias
    options: dict[str, Any] = {"scaling": scaling, "dropout_p": dropout_p, "seed": seed_tensor}
    if paths.choose(x.device.type, x.device.index) == "reference":
        return reference.lora_linear_mixed(x, reference.plain(weight), *tensors, **options)
    if is_compiling() or has_torch_function((x, weight, *lora_a, *lora_b)):
        y: Tensor = torch.ops.fused_lora.lora_linear_mixed(x, weight, *tensors, **options)
        return y
    assert _compiled is not None
    y = _compiled.lora_linear_mixed(x, weight, *tensors, scaling, dropout_p, seed_tensor, False)
    return y


def lora_linear_grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: Sequence[float],
    dropout_p: Sequence[float] | None = None,
    training: bool = True,
    seeds: Sequence[Tensor | int | None] | None = None,
) -> list[Tensor]:
    """`lora_linear` of several projections of one x (query, key and value; gate and up), in one call.

    x is read once for all their products with A and saved once, and backward adds up one gradient of it. In
    16 bits each addition rounds, as autograd's own sum of the projections' gradients does.

    Args:
        weights, lora_a, lora_b, biases, scalings, dropout_p, seeds: one entry for each projection, as
            `lora_linear` takes it. Ranks and out_features may differ; lora_a's dtype may not. Each projection
            drops out by a mask of its own.

    Returns:
        One output for each projection.

    Raises what `lora_linear` raises, and ValueError for lists of different lengths. A backward frees what
    was saved for all projections, whichever of their outputs it comes from.
    """
    count = len(weights)
    biases = [None] * count if biases is None else biases
    dropout_p = [0.0] * count if dropout_p is None else dropout_p
    seeds = [None] * count if seeds is None else seeds
    for name, entries in (
        *(("lora_a", lora_a), ("lora_b", lora_b), ("biases", biases)),
        *(("scalings", scalings), ("dropout_p", dropout_p), ("seeds", seeds)),
    ):
        check_count("lora_linear_grouped", entries, name, count, "weights")
    if count == 0:
        raise ValueError("lora_linear_grouped: weights must not be empty")
    for p in dropout_p:
        check_probability("lora_linear_grouped", p, "dropout_p")
    ps = [p if training else 0.0 for p in dropout_p]
    drawn = [seed_on(x.device, seed) if p > 0.0 else None for p, seed in zip(ps, seeds, strict=True)]
    if paths.choose(x.device.type, x.device.index) == "reference":
        for i, a in enumerate(lora_a):
            if a.dtype != lora_a[0].dtype:
                wanted = f"{lora_a[0].dtype} (as lora_a[0])"
                raise TypeError(f"lora_linear_grouped: lora_a[{i}] must be {wanted}, got {a.dtype}")
        each = zip(weights, lora_a, lora_b, biases, scalings, ps, drawn, strict=True)
        return [
            reference.lora_linear(
                x,
                reference.plain(weight),
                *(a, b, bias),
                scaling=scaling,
                dropout_p=p,
                seed=seed,
            )
            for weight, a, b, bias, scaling, p, seed in each
        ]
    if is_compiling() or has_torch_function((x, *weights, *lora_a, *lora_b)):
        ys: list[Tensor] = torch.ops.fused_lora.lora_linear_grouped(
            x, weights, lora_a, lora_b, biases, scalings=scalings, dropout_p=ps, seeds=drawn
        )
        return ys
    assert _compiled is not None
    ys = _compiled.lora_linear_grouped(x, weights, lora_a, lora_b, biases, scalings, ps, drawn, False)
    return ys


def is_sharded(weight: Tensor) -> bool:
    """Whether it is a DTensor. Who has none is spared the import of torch.distributed.tensor."""
    if type(weight) is Parameter or type(weight) is Tensor:
        return False
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(weight, tensors.DTensor)


def dropout_of(
    op: str, x: Tensor, dropout_p: float, training: bool, seed: Tensor | int | None
) -> tuple[float, Tensor | None]:
    """The probability of a call's dropout, and its seed where it drops anything."""
    check_probability(op, dropout_p, "dropout_p")
    if training and dropout_p > 0.0:
        return dropout_p, seed_on(x.device, seed)
    return 0.0, None


def seed_on(device: torch.device, seed: Tensor | int | None) -> Tensor:
    """A dropout seed as the op takes it: one int64 on `device`; drawn there where none is given.

    A tensor on the device, drawn outside the op: nothing synchronises, a traced graph saves it instead
    of drawing again, and a checkpoint's recompute, which restores torch's generator, draws the same.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        return torch.tensor([seed], dtype=torch.int64, device=device)
    return seed


def dropout_mask(
    seed: Tensor | int,
    rows: int,
    columns: int,
    p: float,
    *,
    row_offset: int = 0,
    column_offset: int = 0,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """The mask that `lora_linear` applies to rows×columns of x for a seed: true, or 1, where it keeps.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) draws 16 bits an
    element; the same mask on every device.

    Args:
        seed: an int, which means the CPU, or one int64 on the device that the mask is for.
        rows, columns: the mask's size.
        p: probability with which an element is dropped, rounded to a multiple of 2⁻¹⁶.
        row_offset, column_offset: where in a larger mask this one begins (a shard's rows or columns).
        dtype: torch.bool or a floating-point dtype.

    Raises ValueError and TypeError for what does not fit, by the argument's name.
    """
    seed_tensor = seed if isinstance(seed, Tensor) else seed_on(torch.device("cpu"), seed)
    if not paths.compiled(seed_tensor.device.type, seed_tensor.device.index):
        check_mask_arguments(seed_tensor, rows, columns, p, row_offset, column_offset)
        mask = reference.dropout_mask(
            seed_tensor, rows, columns, p, row_offset=row_offset, column_offset=column_offset
        )
        return mask.to(dtype)
    mask = torch.ops.fused_lora.dropout_mask(
        seed_tensor, rows, columns, p, row_offset=row_offset, column_offset=column_offset, dtype=dtype
    )
    assert isinstance(mask, Tensor)
    return mask


def _masks(
    info: Any, in_dims: tuple[int | None, ...], seed: Tensor, *sizes: Any, **options: Any
) -> tuple[Tensor, int]:
    """A mask for each seed of a batch, which vmap(…, randomness="different") draws."""
    seeds = seed.movedim(in_dims[0] or 0, 0)
    return torch.stack([torch.ops.fused_lora.dropout_mask(one, *sizes, **options) for one in seeds]), 0


if _compiled is not None:
    torch.library.register_vmap("fused_lora::dropout_mask", _masks)


def clear_cast_cache() -> None:
    """Drop the copies of frozen weights that autocast calls keep in the autocast dtype.

    They follow a weight by torch's version counter and its storage. A write through `weight.data` moves
    neither, so call this after one.
    """
    if _compiled is not None:
        _compiled.clear_cast_cache()
