"""python -m examples.shop JOB tunes one of the shop's jobs; `serve` answers with all their adapters."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from examples.product_copy.arguments import positive, whole
from examples.product_copy.errors import DemoError, one_line
from examples.shop.jobs import JOBS, Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for wrong input."""
    asked = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute that is to be renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            if asked.command == "serve":
                _serve(asked)
            else:
                _tune(JOBS[asked.command], asked)
    except DemoError as error:
        print(f"shop: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"shop: {one_line(error)}; this needs pip install 'fused-lora[demo]'", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.shop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="JOB")
    for job in JOBS.values():
        one = commands.add_parser(job.name, help=job.about)
        one.add_argument("--steps", type=whole, default=job.steps, help="(default: %(default)s)")
        one.add_argument("--batch-size", type=whole, default=job.batch_size, help="(default: %(default)s)")
        one.add_argument(
            "--targets", nargs="+", default=["o_proj"], help="ends of module names (default: o_proj)"
        )
        one.add_argument("--r", type=whole, default=16, help="rank (default: %(default)s)")
        one.add_argument("--alpha", type=positive, default=32.0, help="(default: %(default)s)")
        one.add_argument(
            "--lr", type=positive, default=job.lr, help="highest learning rate (default: %(default)s)"
        )
        one.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
        one.add_argument("--heldout", type=whole, help="measure on so many held-out examples (default: all)")
        _common(one)
    serve = commands.add_parser("serve", help="answer requests, JOB: TEXT a line, from one frozen model")
    _common(serve)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a transformers directory (else SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/shop"),
        help="a folder for each job goes here (default: %(default)s)",
    )


def _tune(job: Job, asked: argparse.Namespace) -> None:
    _quieten()
    from examples.product_copy.model import smollm2
    from examples.shop.language_model import LanguageModel
    from examples.shop.run import run
    from examples.shop.tuning import Settings

    model = asked.model or smollm2()
    settings = Settings(
        model=model.resolve().name,
        steps=asked.steps,
        batch_size=asked.batch_size,
        targets=tuple(asked.targets),
        r=asked.r,
        alpha=asked.alpha,
        lr=asked.lr,
        seed=asked.seed,
    )
    folder = asked.out / job.name
    outcome = run(job, LanguageModel.load(model), settings, folder, asked.heldout)
    print(
        f"\n{outcome.table()}\n\n{outcome.minutes:.1f} minutes. Report, figures and adapter are in {folder}"
    )


def _serve(asked: argparse.Namespace) -> None:
    _quieten()
    from examples.product_copy.model import smollm2
    from examples.shop.serving import Shop

    shop = Shop.load(asked.model or smollm2(), asked.out)
    print(
        f"For {', '.join(shop.jobs)}. A request a line, as support: Sharpening\\nDo you sharpen knives?",
        flush=True,
    )
    for line in sys.stdin:
        if line.strip():
            print(shop.answer(line.strip()), flush=True)


def _quieten() -> None:
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
