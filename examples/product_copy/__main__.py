"""python -m examples.product_copy: the run, from the arguments to the report."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.product_copy import data
from examples.product_copy.arguments import positive, whole
from examples.product_copy.errors import DemoError, one_line

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

    option("--steps", whole, 40, "optimiser steps on each side")
    option("--targets", str, "o_proj", "what add_lora adapts: o_proj+fc2, all, a pattern of paths…")
    option("--r", whole, 16, "rank of the adapters")
    option("--alpha", positive, 32.0, "the adapters' scale is alpha / r")
    option("--lr", positive, 5e-3, "highest learning rate")
    option("--batch-size", whole, 4, "examples in a step")
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
        'JSON lines: products as in the catalogue, or {"prompt", "completion", "split"} (else 84 of the '
        "catalogue's products)",
    )
    option("--out", Path, Path("out/product_copy"), "where the results go")
    option("--max-length", whole, 512, "longest example in tokens")
    return parser


def _run(asked: argparse.Namespace) -> list[str]:
    """The whole demo; returns what failed."""
    source = asked.data or data.CATALOGUE
    examples = data.read(asked.data) if asked.data else data.sample()
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {asked.out}: {error.strerror}") from error

    # Only now, after what is quick to check: these take seconds to import.
    import transformers

    from examples.product_copy import model, plot, quality, report
    from examples.product_copy.comparison import compare

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    directory = asked.model or model.smollm2()
    tokenizer = model.load_tokenizer(directory)
    encoded = data.encode(examples, tokenizer, asked.max_length, source)
    faults = quality.check(examples, tokenizer, asked.max_length)
    if faults.failed:  # which spoils what is learnt, and not the comparison
        print(f"{source}: its examples have faults\n{faults}", flush=True)
    results = compare(asked, directory, tokenizer, examples, encoded)

    plot.draw(results, asked.out / report.PLOT)
    (asked.out / "report.md").write_text(report.markdown(results), encoding="utf-8")
    text = json.dumps(results.metrics(), indent=2, ensure_ascii=False)
    (asked.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print("\n" + report.terminal(results))
    print(f"\n{results.minutes:.1f} minutes. Report, picture, metrics and adapter are in {asked.out}")
    return results.failures()


if __name__ == "__main__":
    sys.exit(main())
