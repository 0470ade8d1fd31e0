"""One job tuned: PEFT's adapter on the frozen model, its layers made fused, and transformers' Trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import transformers
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint

import fused_lora
from examples.product_copy import data
from examples.product_copy.data import Encoded
from examples.product_copy.errors import DemoError, one_line
from examples.shop.language_model import LanguageModel

ADAPTER = "adapter"
SAVE_EVERY = 10  # steps
_CHECKPOINTS, _SETTINGS = "checkpoints", "settings.json"


@dataclass(frozen=True)
class Settings:
    model: str
    steps: int
    batch_size: int
    targets: tuple[str, ...]
    r: int
    alpha: float
    lr: float
    seed: int


def tune(
    language: LanguageModel,
    train: Sequence[Encoded],
    folder: Path,
    settings: Settings,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> fused_lora.Report:
    """Tunes `language.model`, which becomes a PEFT model, and saves the adapter in folder/adapter.

    What an interrupted run with the same settings left in the folder is taken up again.
    """
    checkpoint = _interrupted(folder, settings)
    if checkpoint is not None and _steps_of(checkpoint) >= settings.steps:  # stopped while it was measured
        language.model = peft.PeftModel.from_pretrained(language.model, checkpoint, is_trainable=True)
        language.model.save_pretrained(folder / ADAPTER)
        return fused_lora.fuse(language.model)
    transformers.set_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    try:
        language.model = peft.get_peft_model(language.model, config)
    except ValueError as error:
        raise DemoError(f"--targets {' '.join(settings.targets)}: {one_line(error)}") from error
    report = fused_lora.fuse(language.model)
    trainer = transformers.Trainer(
        model=language.model,
        args=transformers.TrainingArguments(
            output_dir=str(folder / _CHECKPOINTS),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.lr,
            lr_scheduler_type="linear",
            warmup_steps=max(1, settings.steps // 10),
            logging_steps=5,
            save_steps=SAVE_EVERY,
            save_total_limit=1,
            seed=settings.seed,
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=False,
        ),
        train_dataset=_Encoded(train),
        data_collator=lambda items: _as_dict(data.collate(items, language.pad_id)),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    language.model.save_pretrained(folder / ADAPTER)
    return report


def _interrupted(folder: Path, settings: Settings) -> str | None:
    """The checkpoint to go on from, if there is one. The settings are written down for the next run."""
    path = folder / _SETTINGS
    asked = json.loads(json.dumps(asdict(settings)))
    last = get_last_checkpoint(folder / _CHECKPOINTS) if (folder / _CHECKPOINTS).is_dir() else None
    if last is not None:
        were = json.loads(path.read_text(encoding="utf-8"))
        if were != asked:
            changed = [
                f"{name} {were.get(name)}, not {asked[name]}"
                for name in asked
                if were.get(name) != asked[name]
            ]
            raise DemoError(
                f"{folder}: a run stopped there that had {'; '.join(changed)}. Ask for the same to go on "
                "with it, delete the folder to begin anew, or give another --out"
            )
        print(f"Going on from {last}", flush=True)
    path.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    return last


def _steps_of(checkpoint: str) -> int:
    state = (Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8")
    return int(json.loads(state)["global_step"])


def finish(folder: Path) -> None:
    """Forgets where the run was: the next one begins anew."""
    shutil.rmtree(folder / _CHECKPOINTS)


class _Encoded(Dataset[Encoded]):
    def __init__(self, items: Sequence[Encoded]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Encoded:
        return self.items[index]


def _as_dict(batch: data.Batch) -> dict[str, Any]:
    return {**batch.inputs(), "labels": batch.labels}
