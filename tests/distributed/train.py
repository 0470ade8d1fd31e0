"""What `accelerate launch` runs: a script that trains tiny adapted models by transformers' Trainer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from torch import Tensor

import fused_lora
from tests.distributed.models import adapted_model

STEPS = 6


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 64, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def train(directory: Path, owner: str, dropout: float, batch: int, resume: Path | None) -> None:
    """Leaves the losses of the steps in the directory, and the trained parameters."""
    model = adapted_model(owner, dropout)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())
    if arguments.world_size > 1:
        fused_lora.share_choices()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        history = {"processes": arguments.world_size, "losses": losses}
        (directory / "history.json").write_text(json.dumps(history))
        torch.save([p.detach() for p in model.parameters() if p.requires_grad], directory / "trained.pt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--run", action="append", help="owner:dropout", required=True)
    parser.add_argument("--resume", type=Path, help="the directory of an earlier launch's runs")
    options = parser.parse_args()
    for run in options.run:
        owner, dropout = run.split(":")
        halfway = options.resume / run / f"checkpoint-{STEPS // 2}" if options.resume else None
        train(options.directory / run, owner, float(dropout), options.batch, halfway)


if __name__ == "__main__":
    main()
