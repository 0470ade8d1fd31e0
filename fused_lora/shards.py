"""The op on shards: parameters that are DTensors, as tensor parallelism lays them out.

Of y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ every process computes the op itself, on what it holds, where W is split
along one of its two axes and A and B as follows:

             x          W         A          B          b          y          by all-reduce
    colwise  whole      rows      whole      rows       rows       columns    dx, dA
    rowwise  columns    columns   columns    whole      whole      to add     y, dB

Colwise: h = s · drop(x) Aᵀ is the same everywhere, and dx and dA = gᵀ drop(x) are sums over out_features.
Rowwise: y and h are sums over in_features, and y is linear in h, so that one all-reduce, of y, does for both;
the first process adds b; g = s · dy B is the same everywhere, and dB = dyᵀ h a sum over in_features.

One seed, the first process's, makes one mask, of which each process draws the columns of its x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from fused_lora import ops
from fused_lora.arguments import MASK_LANES

WHOLE = Replicate()
ROWS, COLUMNS = Shard(0), Shard(1)


@dataclass(frozen=True)
class Layout:
    """Where the parameters' shards lie. weight: out_features×in_features."""

    name: str
    weight: Placement
    lora_a: Placement
    lora_b: Placement
    bias: Placement


COLWISE = Layout("colwise", weight=ROWS, lora_a=WHOLE, lora_b=ROWS, bias=ROWS)
ROWWISE = Layout("rowwise", weight=COLUMNS, lora_a=COLUMNS, lora_b=WHOLE, bias=WHOLE)
LAYOUTS = (COLWISE, ROWWISE)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    seed: Tensor | int | None,
) -> DTensor:
    """The op on DTensors. x is brought to the layout that it must have; y is as the table has it, for the
    caller to redistribute. A seed that is given must be the same in every process."""
    tensors: dict[str, Any] = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, DTensor):
            kind = type(tensor).__name__
            raise TypeError(f"lora_linear: {name} must be a DTensor, as weight is, got a {kind}")
    reason = obstacle(weight, lora_a, lora_b, bias, dropout_p)
    if reason:
        raise ValueError(f"lora_linear: {reason}")
    assert isinstance(x, DTensor)
    assert isinstance(weight, DTensor)
    mesh, last = weight.device_mesh, x.dim() - 1
    if x.device_mesh != mesh:
        raise ValueError(f"lora_linear: x must be on weight's mesh, {mesh}, got {x.device_mesh}")
    if dropout_p > 0.0 and seed is None:
        seed = common_seed(weight.device, mesh)
    colwise = layout_of(weight) is COLWISE
    y = ops.lora_linear(
        _local(x, WHOLE if colwise else Shard(last)),
        _local(weight),
        _local(lora_a),
        _local(lora_b),
        None if bias is None else _local(bias) if colwise else _added_once(bias),
        scaling=scaling,
        dropout_p=dropout_p,
        seed=seed,
        column_offset=0 if colwise or not dropout_p else _width(weight) * mesh.get_local_rank(),
    )
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    return DTensor.from_local(
        y,
        mesh,
        [Shard(last) if colwise else Partial()],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def obstacle(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, dropout_p: float
) -> str | None:
    """Why the op does not serve a sharded weight with these parameters; None where it does."""
    reason = weight_obstacle(weight)
    if reason:
        return reason
    assert isinstance(weight, DTensor)
    layout = layout_of(weight)
    assert layout is not None
    for name, tensor in {"lora_a": lora_a, "lora_b": lora_b, "bias": bias}.items():
        if tensor is None:
            continue
        wanted = (getattr(layout, name),)
        if not isinstance(tensor, DTensor) or tensor.placements != wanted:
            have = tensor.placements if isinstance(tensor, DTensor) else f"a {type(tensor).__name__}"
            return f"{name} must be laid out as {wanted} beside a {layout.name} weight, and is {have}"
        if tensor.device_mesh != weight.device_mesh:
            return f"{name} must be on weight's mesh, {weight.device_mesh}, and is on {tensor.device_mesh}"
    if dropout_p and layout is ROWWISE and _width(weight) % MASK_LANES:
        return (
            f"with dropout every process must have in_features in multiples of {MASK_LANES}, and each of "
            f"{weight.device_mesh.size()} has {_width(weight)} of {weight.shape[1]}"
        )
    return None


def weight_obstacle(weight: Tensor) -> str | None:
    """Why no adapter goes beside a sharded weight, out_features×in_features; None where one does."""
    assert isinstance(weight, DTensor)
    if layout_of(weight) is None:
        known = " or ".join(f"({layout.weight},)" for layout in LAYOUTS)
        return f"its weight is a DTensor laid out as {weight.placements}, not as {known}"
    return None


def layout_of(weight: DTensor) -> Layout | None:
    return next((layout for layout in LAYOUTS if weight.placements == (layout.weight,)), None)


def common_seed(device: torch.device, mesh: DeviceMesh) -> Tensor:
    """A seed that all processes of a one-dimensional mesh hold: its first process's. A collective."""
    seed = ops.seed_on(device, None)
    torch.distributed.broadcast(seed, group=mesh.get_group(), group_src=0)
    return seed


def placed(tensor: Tensor, operand: str, weight: Tensor) -> Tensor:
    """`tensor` as "lora_a", "lora_b" or "bias" of a sharded weight, laid out as the weight's layout wants it:
    the first process's numbers. A collective."""
    assert isinstance(weight, DTensor)
    return distribute_tensor(tensor, weight.device_mesh, [getattr(layout_of(weight), operand)])


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` laid out as a DTensor is: the first process's numbers. A collective."""
    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)


def _local(tensor: Tensor, placement: Placement | None = None) -> Tensor:
    """This process's part of a tensor, in its own or another layout. Where it is whole, each process finds a
    part of the sum that its gradient is: they are all-reduced on their way back."""
    assert isinstance(tensor, DTensor)
    if placement is None:
        (placement,) = tensor.placements
    laid_out = tensor.redistribute(placements=[placement])
    local: Tensor = laid_out.to_local(grad_placements=[Partial() if placement == WHOLE else placement])
    return local


def _added_once(bias: Tensor) -> Tensor | None:
    """The bias as one of the parts whose sum is y. Its gradient, the sum of dy's rows, each process finds."""
    assert isinstance(bias, DTensor)
    local: Tensor = bias.to_local()
    if bias.device_mesh.get_local_rank() == 0:
        return local
    return local - local.detach() if local.requires_grad else None


def _width(weight: DTensor) -> int:
    """Columns of each process's part of a weight that is split along them; the last ones' may be fewer."""
    return -(-weight.shape[1] // weight.device_mesh.size())
