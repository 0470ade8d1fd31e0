"""What a job's run found, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.shop.tuning import Settings


@dataclass(frozen=True)
class Sample:
    prompt: str
    shop: str
    before: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """Figures on what was held out: of the frozen model, of the tuned one, and some to see them by."""

    job: str
    about: str
    settings: Settings
    train: int
    heldout: int
    trained_parameters: int
    loss_before: float
    loss_after: float
    before: dict[str, float]
    after: dict[str, float]
    beside: dict[str, float]
    samples: list[Sample]
    minutes: float

    def table(self) -> str:
        rows = [("held-out loss", self.loss_before, self.loss_after)]
        rows += [(name, self.before[name], self.after[name]) for name in self.after]
        lines = [f"{'':38}{'before':>8}{'after':>8}"]
        lines += [f"{name:38}{before:8.3f}{after:8.3f}" for name, before, after in rows]
        lines += [f"{name:38}{value:16.3f}" for name, value in self.beside.items()]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / "outcome.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self._markdown(), encoding="utf-8")

    def _markdown(self) -> str:
        s = self.settings
        parts = [
            f"# {self.about[0].upper()}{self.about[1:]}",
            f"{s.model}, frozen, with adapters on {', '.join(s.targets)} (r = {s.r}, alpha = {s.alpha:g}, "
            f"{self.trained_parameters:,} trained parameters): {s.steps} steps of {s.batch_size} examples, "
            f"learning rate up to {s.lr:g}, seed {s.seed}. {self.train} examples train, {self.heldout} are "
            f"held out; all figures are of those. {self.minutes:.1f} minutes.",
            f"```\n{self.table()}\n```",
            "The first of the held-out examples, by greedy decoding; nothing picked or edited.",
        ]
        for sample in self.samples:
            parts += [
                "\n".join(f"> {line}".rstrip() for line in sample.prompt.splitlines()),
                f"**The shop's own:** {sample.shop}",
                f"**Before:** {sample.before}",
                f"**After:** {sample.after}",
            ]
        return "\n\n".join(parts) + "\n"
