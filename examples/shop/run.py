"""One job from its data to its report: checked, tuned, and measured with and without the adapter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from examples.product_copy import quality
from examples.product_copy.data import Example
from examples.product_copy.errors import DemoError
from examples.shop import tuning
from examples.shop.jobs import Job
from examples.shop.language_model import LanguageModel
from examples.shop.report import Outcome, Sample
from examples.shop.tuning import Settings

SAMPLES = 3


def run(job: Job, language: LanguageModel, settings: Settings, folder: Path, heldout: int | None) -> Outcome:
    """Writes the adapter and the report into `folder`. `heldout`: how many held-out examples; None, all."""
    started = time.perf_counter()
    examples = job.examples()
    train = [example for example in examples if not example.heldout]
    unseen = [example for example in examples if example.heldout][:heldout]
    folder.mkdir(parents=True, exist_ok=True)
    demand_sound(examples, language)
    report = tuning.tune(language, language.encode(train), folder, settings)
    print(report)

    shown = unseen[:SAMPLES]

    def measure() -> tuple[float, dict[str, float], list[str]]:
        return language.loss(unseen), job.measure(language, unseen), language.write(shown, job.longest)

    print("Measuring on what was held out, without the adapter and with it", flush=True)
    with language.model.disable_adapter():  # B was 0 at first, so this is the model before tuning
        loss_before, before, texts_before = measure()
    loss_after, after, texts_after = measure()
    texts = zip(shown, texts_before, texts_after, strict=True)
    outcome = Outcome(
        job=job.name,
        about=job.about,
        settings=settings,
        train=len(train),
        heldout=len(unseen),
        trained_parameters=report.trained,
        loss_before=loss_before,
        loss_after=loss_after,
        before=before,
        after=after,
        beside=job.beside(),
        samples=[Sample(example.prompt, example.completion, *two) for example, *two in texts],
        minutes=(time.perf_counter() - started) / 60,
    )
    outcome.write(folder)
    tuning.finish(folder)
    return outcome


def demand_sound(examples: Sequence[Example], language: LanguageModel) -> None:
    """Says that the data is sound, or raises DemoError with what is wrong with it."""
    report = quality.check(examples, language.tokenizer, language.max_length)
    if report.failed:
        raise DemoError(f"the data is not fit to tune on\n{report}")
    print(f"The data: no fault found in {report.train} rows to train on and {report.held_out} held out")
