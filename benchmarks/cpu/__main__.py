"""LoRA linears on this machine's CPU: ours beside PEFT, the frozen linear and other formulations.

python -m benchmarks.cpu measures a subset of the grid in about ten minutes on two cores: SmolLM2's layers at
r = 16 and the whole model. --full measures all of it, Llama-2-7B's layers too, in hours. Rows are written as
they come; --resume goes on where a run was interrupted. --plan says what would be measured, and roughly how
long it takes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cpu import models, output, pictures, sides
from benchmarks.cpu.cases import (
    DROPOUTS,
    DTYPES,
    FORWARD,
    LAYERS,
    LLAMA,
    RANKS,
    ROWS,
    SHORT_TARGETS,
    SMOLLM2,
    TARGETS,
    Layer,
    batch_cases,
    layer_cases,
    model_cases,
)
from benchmarks.cpu.plan import Plan
from benchmarks.cpu.results import Store
from benchmarks.cpu.session import Session, duration
from examples.product_copy.machine import describe
from fused_lora import choices
from fused_lora.binary import BINARY

MEASURE = Path(__file__).with_name("measure.py")
MODELS = {"smollm2": SMOLLM2, "llama": LLAMA}
SLUGS = {re.sub(r"[^a-z0-9_]+", "-", name.lower()): name for name in sides.SIDES}


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    plan = planned(asked)
    if asked.plan:
        total = sum(map(plan.seconds, plan.cases))
        print(*plan.cases, f"{len(plan.cases)} cases, roughly {duration(total)}", sep="\n")
        return 0
    if any(case.whole_model for case in plan.cases) and (problem := models.obstacle()):
        print(f"Without the whole model: {problem}")
        plan = replace(plan, cases=[case for case in plan.cases if not case.whole_model])
    _warn_if_busy()
    run = identity()
    csv = asked.out / "results.csv"
    try:
        store = Store.resume(csv, run) if asked.resume else Store.begin(csv, run)
    except OSError as error:
        print(f"benchmarks.cpu: --out {asked.out}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"benchmarks.cpu: --resume: {error}", file=sys.stderr)
        return 2
    session = Session(plan, store)
    store.drop(session.cases)
    _decide_anew(asked.out / "choices", keep=asked.resume)
    status = _measure(session, asked.out / "results.json") if session.cases else pytest.ExitCode.OK
    if store.results:
        _tell(asked.out, run, store)
    if status == pytest.ExitCode.INTERRUPTED:
        print("Interrupted. --resume goes on from here.")
    return int(status)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="the whole grid, with more rounds")
    parser.add_argument(
        "--layers", type=_layers, nargs="+", metavar="WHICH", help="smollm2, llama, or sizes as 576x1536"
    )
    parser.add_argument("--r", type=_whole, nargs="+", help="ranks (default: 16; all: 8 16 64)")
    parser.add_argument("--rows", type=_whole, nargs="+", default=ROWS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--dropout",
        type=_probability,
        nargs="+",
        help="(default: 0 0.1, of which the short run takes 0 alone for forwards)",
    )
    parser.add_argument("--threads", type=_whole, nargs="+", help="(default: 1, and 2 where there are cores)")
    parser.add_argument(
        "--targets", nargs="+", help=f"sets of the whole model (default: {' '.join(SHORT_TARGETS)})"
    )
    parser.add_argument("--only", choices=("layers", "batches", "model"), help="one part of it")
    parser.add_argument(
        "--sides", nargs="+", choices=sorted(SLUGS), help="frozen and peft come along; without it all"
    )
    parser.add_argument("--rounds", type=_whole, help="at most so many a case (default: 15; with --full 25)")
    parser.add_argument(
        "--budget",
        type=_seconds,
        help="seconds of a case's rounds, 5 of which run anyway (0.4; with --full 3)",
    )
    parser.add_argument("--resume", action="store_true", help="measure what the last run left undone")
    parser.add_argument("--plan", action="store_true", help="say what would be measured")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="(default: %(default)s)")
    return parser.parse_args(arguments)


def planned(asked: argparse.Namespace) -> Plan:
    layers = [layer for group in asked.layers for layer in group] if asked.layers else None
    if layers is None:
        layers = [it for it in LAYERS if asked.full or it.model == SMOLLM2]
    ranks = asked.r or (RANKS if asked.full else (16,))
    threads = sorted(asked.threads or {1, min(2, _cores())})
    cases = []
    if asked.only in (None, "layers"):
        cases += layer_cases(layers, ranks, asked.rows, asked.dtype, asked.dropout or DROPOUTS, threads)
    if not (asked.full or asked.dropout):
        cases = [case for case in cases if not (case.half == FORWARD and case.dropout)]
    if asked.only in (None, "batches"):
        cases += batch_cases(ranks, asked.dtype, threads)
    if asked.only in (None, "model"):
        targets = asked.targets or (TARGETS if asked.full else SHORT_TARGETS)
        cases += model_cases(targets, ranks, asked.dtype, threads[-1])
    chosen = [SLUGS[slug] for slug in asked.sides or ()]
    return Plan(
        list(dict.fromkeys(cases)),
        rounds=asked.rounds or (25 if asked.full else 15),
        budget=asked.budget or (3.0 if asked.full else 0.4),
        sides={sides.FROZEN, sides.PEFT, *chosen} if chosen else sides.SIDES,
        compile_all=asked.full or bool(chosen),
    )


def identity() -> dict[str, str]:
    """Where and with what this runs: the machine and the versions."""
    said = describe()
    names = ("processor", "python", "torch", "transformers", "peft", "fused_lora")
    return {**{name: said[name] for name in names}, "commit": BINARY.facts.get("commit", "not built")}


def _measure(session: Session, json: Path) -> int:
    options = ["-qq", "-s", "--disable-warnings", "-p", "no:cacheprovider"]
    options += ["--benchmark-quiet", "--benchmark-disable-gc", f"--benchmark-json={json}"]
    return pytest.main([str(MEASURE), *options], plugins=[session])


def _tell(directory: Path, run: dict[str, str], store: Store) -> None:
    """Writes the tables and the pictures, and prints the tables, the summary last."""
    details, summary = output.details(store.results), output.summary(run, store.results)
    (directory / "table.md").write_text(f"{summary}\n\n{details}\n", encoding="utf-8")
    drawn = pictures.draw(directory, run, store.results)
    print(f"\n{details}\n\n{summary}\n")
    print(f"In {directory}: table.md, results.csv, results.json and {len(drawn)} pictures")


def _decide_anew(directory: Path, *, keep: bool) -> None:
    """auto chooses in this run, not by what it remembers of another build of the same commit."""
    if not keep:
        shutil.rmtree(directory, ignore_errors=True)
    os.environ[choices.DIRECTORY_VARIABLE] = str(directory)


def _warn_if_busy() -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(
            f"This machine is busy (load {load:.1f}): ratios will spread, most of all with several threads."
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _layers(text: str) -> list[Layer]:
    if text in MODELS:
        return [it for it in LAYERS if it.model == MODELS[text]]
    sizes = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if sizes is None:
        raise argparse.ArgumentTypeError(f"is {', '.join(MODELS)} or sizes as 576x1536, got {text!r}")
    k, n = map(int, sizes.groups())
    known = (it for it in LAYERS if (it.in_features, it.out_features) == (k, n))
    return [next(known, Layer("layer", "", k, n))]


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number ≥ 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
