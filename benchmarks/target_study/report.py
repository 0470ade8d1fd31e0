"""The study's tables, as Markdown and as CSV, and what it says of the claim."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.turns import Spread, paired
from benchmarks.tables import markdown
from benchmarks.target_study import cost
from benchmarks.target_study.rows import Cost, Store
from benchmarks.target_study.verdict import Quality, Statement, statements

LOSS = "held-out loss"
PICTURE = "target_study.svg"  # beside the report, which shows it


def qualities(store: Store, jobs: Sequence[str]) -> dict[str, dict[str, Quality]]:
    """By job and by what is measured, more is better: the loss counts negative."""
    frozen, tuned = store.frozen(), store.tuned()
    found: dict[str, dict[str, Quality]] = {}
    for job in jobs:
        rows = [row for row in tuned if row.job == job]
        if not rows or job not in frozen:
            continue
        scores = {LOSS: Quality(-frozen[job].loss, _by_targets((row.targets, -row.loss) for row in rows))}
        for name, value in frozen[job].figures.items():
            scores[name] = Quality(value, _by_targets((row.targets, row.figures[name]) for row in rows))
        found[job] = scores
    return found


def _by_targets(scores: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for targets, score in scores:
        found.setdefault(targets, []).append(score)
    return found


def seconds(costs: Mapping[str, Cost], side: str = cost.OURS) -> dict[str, float]:
    return {name: Spread.of(it.seconds[side]).median for name, it in costs.items()}


def timing_noise(costs: Mapping[str, Cost]) -> float:
    """The largest distance of the quartiles of a set's step times, as a share of their median."""
    return max((2 * Spread.of(it.seconds[cost.OURS]).noise for it in costs.values()), default=0.0)


def markdown_report(
    store: Store, run: Mapping[str, str], jobs: Sequence[str], lrs: Mapping[str, float]
) -> str:
    scores, costs = qualities(store, jobs), store.costs()
    medians, noise = seconds(costs), timing_noise(costs)
    said = {
        (job, name): statements(quality, medians, noise)
        for job, measured in scores.items()
        for name, quality in measured.items()
    }
    parts = [
        "# Which projections to adapt",
        ", ".join(f"{name} {_plain(value)}" for name, value in {**run, **store.settings}.items()) + ".",
        _how(store),
        "## What held",
        _summary(scores, said),
        "## Cost of a training step",
        _costs(store, lrs),
        f"Two sets' times are told apart from {noise:.0%} on: so far a set's own rounds vary.",
    ]
    if scores and costs:
        parts += ["## Quality against cost", f"![Quality against a step's time, by job]({PICTURE})"]
    for job, measured in scores.items():
        parts += [f"## {job}", _quality(measured, costs)]
        for name, quality in measured.items():
            parts.append(
                f"By {name} (noise {_number(quality.noise)}):\n\n"
                + "\n".join(f"- {statement}" for statement in said[job, name])
            )
    return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _summary(
    scores: Mapping[str, Mapping[str, Quality]], said: Mapping[tuple[str, str], Sequence[Statement]]
) -> str:
    claims = list(dict.fromkeys(statement.claim for made in said.values() for statement in made))
    rows = []
    for (job, name), made in said.items():
        verdicts = {statement.claim: statement.verdict for statement in made}
        noise = _number(scores[job][name].noise)
        rows.append([f"{job}, {name}", *(verdicts.get(claim, "–") for claim in claims), noise])
    return markdown(["by", *claims, "noise"], rows)


def _how(store: Store) -> str:
    longest = max((row.seconds for row in store.tuned()), default=0.0)
    return (
        f"{len(store.tuned())} runs, the longest {longest:.0f} s. Quality: mean over the seeds ± their "
        "standard deviation. Rank and alpha are the same for all sets; a set's learning rate is the one with "
        "which its pilots did best, on training examples that they left out."
    )


def _costs(store: Store, lrs: Mapping[str, float]) -> str:
    rows = []
    for targets, it in store.costs().items():
        ours, theirs = (Spread.of(it.seconds[side]) for side in (cost.OURS, cost.PEFT))
        ratio = paired(it.seconds[cost.PEFT], it.seconds[cost.OURS])
        rows.append(
            [
                targets,
                f"{it.trained:,}",
                f"{ours.median:.3g}",
                f"{theirs.median:.3g}",
                f"{ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f})",
                f"{it.peak_bytes[cost.OURS] / 2**20:.0f}",
                f"{it.peak_bytes[cost.PEFT] / 2**20:.0f}",
                f"{lrs[targets]:g}" if targets in lrs else "–",
            ]
        )
    return markdown(
        ["targets", "trained", "ours, s", "PEFT, s", "PEFT/ours", "ours, MiB", "PEFT, MiB", "learning rate"],
        rows,
    )


def _quality(measured: Mapping[str, Quality], costs: Mapping[str, Cost]) -> str:
    names = list(measured)
    first = measured[names[0]]
    rows = [["frozen", *(_number(abs(measured[name].frozen)) for name in names), "", ""]]
    for targets in first.runs:
        cells = [
            f"{abs(measured[name].mean(targets)):.3f} ± {measured[name].deviation(targets):.3f}"
            for name in names
        ]
        share = f"{first.gain(targets):.0%}"
        rows.append([targets, *cells, share, f"{costs[targets].trained:,}" if targets in costs else "–"])
    return markdown(["targets", *names, "of the best gain in loss", "trained"], rows)


def _number(value: float) -> str:
    return f"{value:.3f}"


def write_csv(path: Path, store: Store) -> None:
    """A row for each run; costs are in the columns of its targets."""
    costs = store.costs()
    ours, theirs = seconds(costs), seconds(costs, cost.PEFT)
    figures = sorted({name for row in store.tuned() for name in row.figures})
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            ["job", "targets", "seed", "lr", "seconds", "trained", "step_ours", "step_peft", "loss", *figures]
        )
        for row in store.tuned():
            it = costs.get(row.targets)
            steps = ours.get(row.targets, ""), theirs.get(row.targets, "")
            out.writerow(
                [
                    *(row.job, row.targets, row.seed, row.lr, f"{row.seconds:.1f}"),
                    *(it.trained if it else "", *steps, row.loss),
                    *(row.figures.get(name, "") for name in figures),
                ]
            )
