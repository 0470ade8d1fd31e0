"""All that one run of the demo found, and whether it is what it has to be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from examples.product_copy.handover import Handover

# In float32 the two sides may differ by the order of their sums, and by no more. Measured on SmolLM2: 0 where
# alpha / r is a power of two (40 steps; the scaling is exact then), 1e-6 where it is not (24 steps), and 2e-6
# between two runs of PEFT's (40 steps) of which one had every frozen weight moved by a rounding error. The
# bound is fifty times that.
LOSS_BOUND = 1e-4
# Of the largest logit, which is 43 for SmolLM2. Measured: 0 and 2e-6, in the same two cases.
LOGIT_BOUND = 2e-5


@dataclass(frozen=True)
class SideResult:
    """One side's run. Losses and seconds have an entry for each step; the held-out losses are means."""

    name: str
    losses: list[float]
    seconds: list[float]
    saved_bytes: int
    heldout_before: float
    heldout_after: float


@dataclass(frozen=True)
class Sample:
    """A held-out product: the shop's own text, and the model's before and after tuning."""

    title: str
    prompt: str
    shop: str
    before: str
    after: str


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Results:
    settings: dict[str, Any]
    machine: dict[str, str]
    examples: dict[str, int]
    layers: int
    trained: int
    total: int
    ours: SideResult
    peft: SideResult
    handover: Handover
    samples: list[Sample]
    minutes: float

    @property
    def sides(self) -> tuple[SideResult, SideResult]:
        return self.ours, self.peft

    @property
    def loss_difference(self) -> float:
        """The largest distance between the two loss curves, the held-out losses included."""
        ours, peft = (
            [*side.losses, side.heldout_before, side.heldout_after] for side in (self.ours, self.peft)
        )
        differences = [abs(a - b) for a, b in zip(ours, peft, strict=True)]
        return max(differences, key=lambda d: (math.isnan(d), d))  # one that is not a number is the worst

    @property
    def coincide(self) -> bool:
        return self.loss_difference <= LOSS_BOUND

    @property
    def logit_bound(self) -> float:
        return LOGIT_BOUND * self.handover.largest

    @property
    def ratio(self) -> Spread:
        """PEFT's time over ours, step by step on the same batch."""
        return Spread.of([b / a for a, b in zip(self.ours.seconds, self.peft.seconds, strict=True)])

    def failures(self) -> list[str]:
        """What is not as it has to be, a sentence each."""
        found = []
        if not self.coincide:
            found.append(
                f"the losses of the two sides differ by {self.loss_difference:.2g}, more than {LOSS_BOUND:g}"
            )
        if not self.handover.difference <= self.logit_bound:  # so that what is not a number fails too
            found.append(
                f"with the saved adapter PEFT's logits differ from ours by {self.handover.difference:.2g}, "
                f"more than {self.logit_bound:.2g}"
            )
        return found

    def metrics(self) -> dict[str, Any]:
        """Everything in plain numbers and texts."""
        return {
            "settings": self.settings,
            "machine": self.machine,
            "examples": self.examples,
            "adapted_layers": self.layers,
            "trained_parameters": self.trained,
            "total_parameters": self.total,
            "trained_share": self.trained / self.total,
            "sides": {
                side.name: {
                    "losses": side.losses,
                    "step_seconds": side.seconds,
                    "step_seconds_spread": asdict(Spread.of(side.seconds)),
                    "saved_for_backward_bytes": side.saved_bytes,
                    "heldout_loss_before": side.heldout_before,
                    "heldout_loss_after": side.heldout_after,
                }
                for side in self.sides
            },
            "loss_difference": self.loss_difference,
            "loss_bound": LOSS_BOUND,
            "step_ratio_peft_over_ours": asdict(self.ratio),
            "adapter_file_bytes": self.handover.file_bytes,
            "logit_difference": self.handover.difference,
            "logit_bound": self.logit_bound,
            "largest_logit": self.handover.largest,
            "largest_effect_on_a_logit": self.handover.effect,
            "samples": [asdict(sample) for sample in self.samples],
            "minutes": self.minutes,
            "failures": self.failures(),
        }
