"""Modules whose parameters FSDP holds: sharded between steps, gathered in forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# In the __dict__ of a module whose parameters fully_shard, or FSDP, holds: its mark for torch.compile.
GATHERED = "_is_fsdp_managed_module"


def is_gathered(module: nn.Module) -> bool:
    return GATHERED in module.__dict__


def autocast_copy(weight: Tensor) -> Tensor:
    """A gathered weight in autocast's dtype, where autocast is on: made for one call, as by torch's linear.

    The op keeps such copies of frozen weights, by memory and version. A gathered weight's memory is given
    back and filled again without a new version, and copies that stay would undo what FSDP is for.
    """
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind) or weight.dtype == torch.float64:
        return weight
    return weight.to(torch.get_autocast_dtype(kind))
