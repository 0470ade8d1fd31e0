"""The adapter as a file, and what stock PEFT makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft

import fused_lora
from examples.product_copy.data import Batch
from examples.product_copy.measure import logits
from examples.product_copy.training import ADAPTER


@dataclass(frozen=True)
class Handover:
    """How far PEFT's logits lie from ours with the same file; the other two give that number its scale."""

    file_bytes: int
    difference: float  # largest |ours − PEFT's|
    largest: float  # largest |logit| of ours
    effect: float  # largest change that the adapter makes to a logit


def hand_over(model: Any, fresh: Any, directory: Path, batches: Sequence[Batch]) -> Handover:
    """Saves the adapter of `model`, loads it into PEFT on the `fresh` base model, compares their logits."""
    fused_lora.save_adapter(model, directory, ADAPTER)
    loaded = peft.PeftModel.from_pretrained(fresh, directory)
    with_adapter = logits(model, batches)
    with fused_lora.disabled(model):
        without = logits(model, batches)
    return Handover(
        file_bytes=sum(path.stat().st_size for path in directory.iterdir()),
        difference=float((with_adapter - logits(loaded, batches)).abs().max()),
        largest=float(with_adapter.abs().max()),
        effect=float((with_adapter - without).abs().max()),
    )
