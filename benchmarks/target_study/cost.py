"""What a training step costs with one set of targets: its time and its memory, ours and PEFT's.

Both sides are PEFT's own model around the same frozen weights, and one of the two is `fuse`d. A step is
forward, backward and the optimiser's, on one batch of a job. They take turns, so that the machine's drift is
the same for both.
"""

from __future__ import annotations

import copy
from functools import partial

import peft
import torch
from torch import nn

import fused_lora
from benchmarks.cpu.memory import peak_bytes
from benchmarks.cpu.turns import Side, Turns
from benchmarks.target_study.rows import Cost
from examples.product_copy import training
from examples.product_copy.data import Batch
from fused_lora.targets import select

OURS, PEFT = "fused_lora", "PEFT"
_LR = 1e-3  # of which the time does not depend


def measure(model: nn.Module, targets: str, batch: Batch, *, r: int, alpha: float, rounds: int) -> Cost:
    """The frozen `model` is not touched."""
    chosen = list(select(model, targets).chosen)
    adapted = {name: _adapted(model, chosen, r, alpha) for name in (PEFT, OURS)}
    fused_lora.fuse(adapted[OURS])
    tuned = {name: training.Side(name, wrapped) for name, wrapped in adapted.items()}
    sides = {name: Side(partial(side.step, batch, _LR)) for name, side in tuned.items()}
    for side in sides.values():
        side.call()  # the optimiser makes its state, and `auto` its choices
    turns = Turns(sides)
    for _ in range(rounds):
        turns.round()
    trained = sum(p.numel() for p in adapted[OURS].parameters() if p.requires_grad)
    return Cost(targets, trained, turns.seconds, peak_bytes(sides))


def _adapted(model: nn.Module, chosen: list[str], r: int, alpha: float) -> nn.Module:
    """PEFT's model with modules of its own around `model`'s parameters."""
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    torch.manual_seed(0)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM")
    wrapped: nn.Module = peft.get_peft_model(shared, config)
    return wrapped.train()
