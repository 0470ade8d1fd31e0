"""Which projections to adapt: quality and cost of sets of targets, on the shop's four jobs or your own data.

python -m benchmarks.target_study runs on SmolLM2-135M-Instruct in an hour and a half on two cores. Rows are
written as they come; the same command goes on where it stopped. --model DIR takes a causal model of yours,
--data FILE your examples (JSON lines of prompt and completion), and the report says what held for them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.target_study import picture, report
from benchmarks.target_study.rows import Store
from benchmarks.target_study.study import Settings, Study
from examples.product_copy import data
from examples.product_copy.arguments import positive, whole
from examples.product_copy.errors import DemoError
from examples.product_copy.machine import describe
from examples.product_copy.model import NAME, smollm2
from examples.shop.jobs import JOBS, Job
from examples.shop.language_model import LanguageModel
from fused_lora.targets import ROLES

SETS = ("qkv", "o_proj", "fc1", "fc2", "o_proj+fc2", "qkv+o_proj", "fc1+fc2", "all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for wrong input."""
    asked = _parser().parse_args(arguments)
    try:
        _study(asked)
    except (DemoError, ValueError, OSError) as error:
        print(f"target_study: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.target_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help=f"a transformers directory (else {NAME})")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen weights"
    )
    parser.add_argument(
        "--jobs", nargs="*", choices=list(JOBS), default=list(JOBS), help="(default: all four)"
    )
    parser.add_argument(
        "--data", nargs="*", type=Path, default=[], metavar="FILE", help="JSON lines of your own"
    )
    parser.add_argument("--targets", nargs="+", type=_targets, default=list(SETS), metavar="SET")
    parser.add_argument("--seeds", type=whole, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=whole, default=10, help="of a run (default: %(default)s)")
    parser.add_argument(
        "--lrs", nargs="+", type=positive, default=[3e-3, 1e-2], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--pilots", type=whole, default=2, help="jobs that choose of --lrs, the first (default: %(default)s)"
    )
    parser.add_argument("--r", type=whole, default=16, help="rank (default: %(default)s)")
    parser.add_argument("--alpha", type=positive, default=32.0, help="(default: %(default)s)")
    parser.add_argument("--heldout", type=whole, default=32, help="examples at most (default: %(default)s)")
    parser.add_argument("--rounds", type=whole, default=7, help="of the step's timing (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/target_study"), help="(default: %(default)s)")
    parser.add_argument("--anew", action="store_true", help="put aside what --out holds")
    parser.add_argument("--report", action="store_true", help="only tell what --out holds")
    return parser


def _targets(text: str) -> str:
    unknown = [name for name in text.split("+") if name not in (*ROLES, "all")]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join((*ROLES, 'all'))}")
    return text


def _study(asked: argparse.Namespace) -> None:
    jobs = [*(JOBS[name] for name in asked.jobs), *map(_own, asked.data)]
    if not jobs:
        raise ValueError("--jobs and --data name no job")
    settings = Settings(
        tuple(asked.targets),
        asked.seeds,
        tuple(asked.lrs),
        asked.steps,
        asked.r,
        asked.alpha,
        asked.heldout,
        asked.rounds,
        asked.pilots,
    )
    directory: Path = asked.model or smollm2()
    language = LanguageModel.load(directory)
    language.model.to(getattr(torch, asked.dtype)).requires_grad_(False)
    known = {"model": directory.resolve().name, "dtype": asked.dtype, "jobs": [job.name for job in jobs]}
    store = Store.open(asked.out / "rows.jsonl", {**known, **asdict(settings)}, anew=asked.anew)
    study = Study(language, jobs, settings, store)
    if not asked.report:
        runs = list(study.runs())
        with tqdm(runs, unit="run", disable=None) as progress:
            for run in progress:
                progress.set_description(run.name)
                store.add(run.row())
    _tell(study, asked.out)


def _tell(study: Study, out: Path) -> None:
    store, jobs = study.store, [job.name for job in study.jobs]
    lrs = {targets: study.lr(targets) for targets in study.settings.targets}
    text = report.markdown_report(store, describe(), jobs, lrs)
    (out / "target_study.md").write_text(text, encoding="utf-8")
    report.write_csv(out / "target_study.csv", store)
    scores, seconds = report.qualities(store, jobs), report.seconds(store.costs())
    if scores and seconds:
        picture.draw(out / report.PICTURE, scores, seconds)
    print(f"{text}\nWritten to {out}")


def _own(path: Path) -> Job:
    return Job(
        path.stem, f"the examples in {path.name}", str, partial(data.read, path), steps=1, batch_size=4
    )


if __name__ == "__main__":
    sys.exit(main())
