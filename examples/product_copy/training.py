"""The same run twice: fused_lora and stock PEFT, step by step in one loop."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_lora
from examples.product_copy.data import Batch
from fused_lora.layer import LoRALinear

ADAPTER = "default"
WARM_UP_SHARE = 0.1


@dataclass
class Side:
    """One of the two: a model with its optimiser, and what its steps gave."""

    name: str
    model: Any
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trained: list[nn.Parameter] = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, weight_decay=0.0)

    def step(self, batch: Batch, lr: float) -> None:
        """One optimiser step, timed from clearing the gradients to having the loss as a number."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = batch_loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - started)


def batch_loss(model: Any, batch: Batch) -> Tensor:
    """The mean loss over the batch's labelled tokens."""
    loss: Tensor = model(**batch.inputs(), labels=batch.labels, use_cache=False).loss
    return loss


def ours(model: Any, targets: str, r: int, alpha: float) -> tuple[Side, fused_lora.Report]:
    """`model` with adapters by fused_lora."""
    report = fused_lora.add_lora(model, targets, r=r, alpha=alpha, adapter_name=ADAPTER)
    return Side("fused_lora", model), report


@torch.no_grad()
def stock_peft(model: Any, example: Side, report: fused_lora.Report, r: int, alpha: float) -> Side:
    """`model` with adapters by PEFT, on the layers that `report` names and from the example's values."""
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=[layer.name for layer in report.swapped],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    for layer in report.swapped:
        source = example.model.get_submodule(layer.name)
        target = wrapped.base_model.model.get_submodule(layer.name)
        assert isinstance(source, LoRALinear)
        target.lora_A[ADAPTER].weight.copy_(source.lora_A[ADAPTER])
        target.lora_B[ADAPTER].weight.copy_(source.lora_B[ADAPTER])
    return Side("PEFT", wrapped)


def train(sides: tuple[Side, Side], batches: Iterable[Batch], steps: int, peak_lr: float) -> None:
    """Both sides on every batch. They take turns at going first, so that neither always finds the caches,
    or the processor's clock, as the other left them."""
    for side in sides:
        side.model.train()
    progress = tqdm(batches, total=steps, desc="tuning", unit="step")
    for step, batch in enumerate(progress):
        lr = peak_lr * schedule(step, steps)
        for side in sides if step % 2 == 0 else sides[::-1]:
            side.step(batch, lr)
        progress.set_postfix({side.name: f"{side.losses[-1]:.3f}" for side in sides})


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: up in a line, then down in a line, never quite 0."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (steps - step) / (steps - warm_up + 1)
