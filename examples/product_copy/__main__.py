"""python -m examples.product_copy: the run, from the arguments to the report."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.product_copy import data
from examples.product_copy.errors import DemoError, one_line

if TYPE_CHECKING:
    from examples.product_copy.results import Results

SAMPLES = 3
_EXTRAS = "pip install 'fused-lora[demo]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where the two sides, or PEFT with the saved adapter, disagree; 2 for wrong input."""
    asked = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute that is to be renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            failures = _run(asked)
    except DemoError as error:
        print(f"product_copy: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"product_copy: {one_line(error)}; the demo needs {_EXTRAS}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"product_copy: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.product_copy",
        description="Tunes a language model on product copy, with fused_lora and with stock PEFT in one "
        "loop, and compares them.",
    )

    def option(name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=kind, default=default, help=text + shown)

    option("--steps", _whole, 40, "optimiser steps on each side")
    option("--targets", str, "o_proj", "what add_lora adapts: o_proj+fc2, all, a pattern of paths…")
    option("--r", _whole, 16, "rank of the adapters")
    option("--alpha", _positive, 32.0, "the adapters' scale is alpha / r")
    option("--lr", _positive, 5e-3, "highest learning rate")
    option("--batch-size", _whole, 4, "examples in a step")
    option("--seed", int, 0, "of the adapters' values and the examples' order")
    option(
        "--model",
        Path,
        None,
        "a transformers directory with a causal language model (else SmolLM2-135M-Instruct)",
    )
    option(
        "--data",
        Path,
        None,
        'JSON lines: products as in the catalogue, or {"prompt", "completion", "split"} (else the catalogue)',
    )
    option("--out", Path, Path("out/product_copy"), "where the results go")
    option("--max-length", _whole, 512, "longest example in tokens")
    return parser


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number ≥ 1, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text}")
    return value


def _run(asked: argparse.Namespace) -> list[str]:
    """The whole demo; returns what failed."""
    source = asked.data or data.CATALOGUE
    examples = data.read(source)
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {asked.out}: {error.strerror}") from error

    # Only now, after what is quick to check: these take seconds to import.
    import transformers

    from examples.product_copy import model, plot, report

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    directory = asked.model or model.smollm2()
    tokenizer = model.load_tokenizer(directory)
    encoded = data.encode(examples, tokenizer, asked.max_length, source)
    results = _compare(asked, directory, tokenizer, examples, encoded)

    plot.draw(results, asked.out / report.PLOT)
    (asked.out / "report.md").write_text(report.markdown(results), encoding="utf-8")
    text = json.dumps(results.metrics(), indent=2, ensure_ascii=False)
    (asked.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print("\n" + report.terminal(results))
    print(f"\n{results.minutes:.1f} minutes. Report, picture, metrics and adapter are in {asked.out}")
    return results.failures()


def _compare(
    asked: argparse.Namespace,
    directory: Path,
    tokenizer: Any,
    examples: Sequence[data.Example],
    encoded: Sequence[data.Encoded],
) -> Results:
    import torch

    from examples.product_copy import measure, training
    from examples.product_copy.handover import hand_over
    from examples.product_copy.model import load_model
    from examples.product_copy.results import Results, Sample, SideResult

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
        machine=_machine(),
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


def _machine() -> dict[str, str]:
    import peft
    import torch
    import transformers

    import fused_lora

    return {
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "fused_lora": fused_lora.__version__,
        "path": fused_lora.explain("cpu").split(":")[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
