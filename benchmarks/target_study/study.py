"""The study's runs, in their order, each left out that the store has already.

The rule, the same for every set of targets: rank and alpha are given; the learning rate is that of a given
few with which pilots do best. A pilot is as long as a run, tunes on seven of eight training examples and is
judged by its loss on the eighth, with a seed that no other run has; of a set's pilots, on the first few jobs,
the least sum of log losses wins. So what is held out chooses nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

import fused_lora
from benchmarks.target_study import cost
from benchmarks.target_study.rows import Cost, Frozen, Pilot, Row, Store, Tuned
from examples.product_copy import data
from examples.product_copy.data import Encoded, Example
from examples.product_copy.training import Side, schedule
from examples.shop.jobs import Job
from examples.shop.language_model import LanguageModel

PILOT_SEED = 1_000_000
VALIDATION_EVERY = 8


@dataclass(frozen=True)
class Settings:
    targets: tuple[str, ...]
    seeds: int
    lrs: tuple[float, ...]
    steps: int
    r: int
    alpha: float
    heldout: int  # examples of a job, at most
    rounds: int  # of the step's timing
    pilots: int  # jobs that choose the learning rate, the first ones


@dataclass(frozen=True)
class Run:
    """One row to come: what it is called and how it is made."""

    name: str
    row: Callable[[], Row]


@dataclass
class Study:
    language: LanguageModel
    jobs: Sequence[Job]
    settings: Settings
    store: Store

    def __post_init__(self) -> None:
        self._examples = {job.name: job.examples() for job in self.jobs}

    def runs(self) -> Iterator[Run]:
        """Those still to do. Costs come first: they are short, and want a quiet machine."""
        for targets in self.settings.targets:
            if not self.store.has(Cost, targets=targets):
                yield Run(f"cost of a step, {targets}", partial(self._cost, targets))
        for job in self.jobs:
            if not self.store.has(Frozen, job=job.name):
                yield Run(f"{job.name}, frozen", partial(self._frozen, job))
        lrs = self.settings.lrs if len(self.settings.lrs) > 1 else ()  # one needs no choice
        for targets, job, lr in product(self.settings.targets, self.jobs[: self.settings.pilots], lrs):
            if not self.store.has(Pilot, job=job.name, targets=targets, lr=lr):
                yield Run(f"{job.name}, {targets}, pilot at {lr:g}", partial(self._pilot, job, targets, lr))
        # Seed by seed, so that an interrupted study has something of every set.
        for seed, job, targets in product(range(self.settings.seeds), self.jobs, self.settings.targets):
            if not self.store.has(Tuned, job=job.name, targets=targets, seed=seed):
                yield Run(f"{job.name}, {targets}, seed {seed}", partial(self._tuned, job, targets, seed))

    def lr(self, targets: str) -> float:
        """The learning rate that the pilots chose."""
        if len(self.settings.lrs) == 1:
            return self.settings.lrs[0]
        logs = dict.fromkeys(self.settings.lrs, 0.0)
        for pilot in self.store.pilots():
            if pilot.targets == targets and math.isfinite(pilot.loss):
                logs[pilot.lr] += math.log(pilot.loss)
            elif pilot.targets == targets:
                logs[pilot.lr] = math.inf
        return min(logs, key=logs.__getitem__)

    def _cost(self, targets: str) -> Cost:
        job = self.jobs[0]
        batch = next(data.shuffled(self._train(job), job.batch_size, 1, 0, self.language.pad_id))
        s = self.settings
        return cost.measure(self.language.model, targets, batch, r=s.r, alpha=s.alpha, rounds=s.rounds)

    def _frozen(self, job: Job) -> Frozen:
        unseen = self._heldout(job)
        return Frozen(job.name, self.language.loss(unseen), job.measure(self.language, unseen))

    def _pilot(self, job: Job, targets: str, lr: float) -> Pilot:
        known = [example for example in self._examples[job.name] if not example.heldout]
        left_out = known[::VALIDATION_EVERY]
        train = [example for index, example in enumerate(known) if index % VALIDATION_EVERY]
        with _Adapter(self.language.model, targets, self.settings, PILOT_SEED):
            self._train_on(self.language.encode(train), job.batch_size, lr, PILOT_SEED)
            loss = self.language.loss(left_out[: self.settings.heldout])
        return Pilot(job.name, targets, lr, loss)

    def _tuned(self, job: Job, targets: str, seed: int) -> Tuned:
        began = time.perf_counter()
        lr = self.lr(targets)
        unseen = self._heldout(job)
        with _Adapter(self.language.model, targets, self.settings, seed):
            self._train_on(self._train(job), job.batch_size, lr, seed)
            loss, figures = self.language.loss(unseen), job.measure(self.language, unseen)
        return Tuned(job.name, targets, seed, lr, loss, figures, time.perf_counter() - began)

    def _train_on(self, items: Sequence[Encoded], batch_size: int, lr: float, seed: int) -> None:
        tuned = Side("tuned", self.language.model.train())
        steps = self.settings.steps
        for step, batch in enumerate(data.shuffled(items, batch_size, steps, seed, self.language.pad_id)):
            tuned.step(batch, lr * schedule(step, steps))

    def _train(self, job: Job) -> list[Encoded]:
        return self.language.encode([example for example in self._examples[job.name] if not example.heldout])

    def _heldout(self, job: Job) -> list[Example]:
        return [example for example in self._examples[job.name] if example.heldout][: self.settings.heldout]


class _Adapter:
    """`model` with a new adapter for as long as the context lasts; then it is the frozen one, bit for bit."""

    def __init__(self, model: Any, targets: str, settings: Settings, seed: int) -> None:
        self.model, self.targets, self.settings, self.seed = model, targets, settings, seed

    def __enter__(self) -> None:
        torch.manual_seed(self.seed)
        fused_lora.add_lora(self.model, self.targets, r=self.settings.r, alpha=self.settings.alpha)

    def __exit__(self, *_: object) -> None:
        fused_lora.remove_lora(self.model)
