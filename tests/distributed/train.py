"""What `accelerate launch` runs: a user's script that trains a fused PEFT model by transformers' Trainer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from torch import Tensor

import fused_lora
from tests.distributed.models import peft_model, plain_model


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 64, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    model = peft_model(plain_model(), options.dropout)
    report = fused_lora.fuse(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(options.directory),
        per_device_train_batch_size=options.batch,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())
    fused_lora.share_choices() if arguments.world_size > 1 else None
    trainer.train(resume_from_checkpoint=str(options.resume) if options.resume else None)
    if trainer.is_world_process_zero():
        history = {
            "processes": arguments.world_size,
            "fused": len(report.swapped),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "sum": sum(p.double().abs().sum().item() for p in model.parameters() if p.requires_grad),
        }
        (options.directory / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main()
