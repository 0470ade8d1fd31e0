"""The comparison itself: both sides set up alike, measured, tuned in one loop and measured again."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.product_copy import data, measure, training
from examples.product_copy.errors import DemoError, one_line
from examples.product_copy.handover import hand_over
from examples.product_copy.machine import describe
from examples.product_copy.model import load_model
from examples.product_copy.results import Results, Sample, SideResult

SAMPLES = 3


def compare(
    asked: argparse.Namespace,
    directory: Path,
    tokenizer: Any,
    examples: Sequence[data.Example],
    encoded: Sequence[data.Encoded],
) -> Results:
    """The comparison that the arguments ask for. Writes the adapter; the rest is the caller's to write."""
    started = time.perf_counter()
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    train_set = [item for item, example in zip(encoded, examples, strict=True) if not example.heldout]
    unseen = [(item, example) for item, example in zip(encoded, examples, strict=True) if example.heldout]
    heldout = data.in_order([item for item, _ in unseen], asked.batch_size, pad_id)
    batches = list(data.shuffled(train_set, asked.batch_size, asked.steps, asked.seed, pad_id))

    torch.manual_seed(asked.seed)
    base = load_model(directory)
    _demand_positions(base, asked.max_length)
    try:
        ours, report = training.ours(base, asked.targets, asked.r, asked.alpha)
    except ValueError as error:
        raise DemoError(f"--targets: {one_line(error).removeprefix('targets: ')}") from error
    print(report)
    peft = training.stock_peft(load_model(directory), ours, report, asked.r, asked.alpha)
    sides = (ours, peft)

    shown = unseen[:SAMPLES]
    asked_for = [item for item, _ in shown]
    # Half as much again as the longest that there is, so that nearly every answer comes to its own end.
    longest = max(len(item.ids) - item.prompt for item in encoded) * 3 // 2

    def write() -> list[str]:
        return measure.write(ours.model, tokenizer, asked_for, longest, pad_id)

    print("Before tuning: memory, held-out loss, samples", flush=True)
    saved = [measure.saved_bytes(side.model, batches[0]) for side in sides]
    before = [measure.heldout_loss(side.model, heldout) for side in sides]
    texts_before = write()
    training.train(sides, batches, asked.steps, asked.lr)
    print("After tuning: held-out loss, samples, the adapter in PEFT", flush=True)
    after = [measure.heldout_loss(side.model, heldout) for side in sides]
    texts_after = write()
    handover = hand_over(
        ours.model, load_model(directory), asked.out / "adapter", [data.collate(asked_for, pad_id)]
    )
    side_results = [
        SideResult(side.name, side.losses, side.seconds, kept, loss_before, loss_after)
        for side, kept, loss_before, loss_after in zip(sides, saved, before, after, strict=True)
    ]
    return Results(
        settings=_settings(asked, directory),
        machine=describe(),
        examples={
            "train": len(train_set),
            "heldout": len(unseen),
            "cut": sum(item.cut for item in encoded),
        },
        layers=len(report.swapped),
        trained=report.trained,
        total=report.total,
        ours=side_results[0],
        peft=side_results[1],
        handover=handover,
        samples=[
            Sample(example.title, example.prompt, example.completion, *texts)
            for (_, example), *texts in zip(shown, texts_before, texts_after, strict=True)
        ],
        minutes=(time.perf_counter() - started) / 60,
    )


def _demand_positions(model: Any, max_length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise DemoError(f"--max-length {max_length}: the model reads {positions} tokens at most")


def _settings(asked: argparse.Namespace, directory: Path) -> dict[str, Any]:
    names = ("steps", "targets", "r", "alpha", "lr", "batch_size", "seed", "max_length")
    return {
        "model": directory.resolve().name,
        "data": (asked.data or data.CATALOGUE).name,
        **{name: getattr(asked, name) for name in names},
    }
