"""Quality against cost, a panel for each job, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from benchmarks.target_study.report import LOSS
from benchmarks.target_study.verdict import Quality, front

matplotlib.use("svg")
from matplotlib import pyplot

# Text as text, and the same file for the same figures.
_FORMAT = {"svg.fonttype": "none", "svg.hashsalt": "target_study"}

_OURS, _REST = "tab:blue", "tab:gray"


def draw(path: Path, scores: Mapping[str, Mapping[str, Quality]], seconds: Mapping[str, float]) -> None:
    """For each job its figure where it has one, else its loss; bars are a seed's standard deviation."""
    figure, panels = pyplot.subplots(
        1, len(scores), figsize=(4.2 * len(scores), 3.8), squeeze=False, layout="constrained"
    )
    for axes, (job, measured) in zip(panels[0], scores.items(), strict=True):
        name = list(measured)[-1]
        quality = measured[name]
        points = {it: (seconds[it], quality.mean(it)) for it in quality.runs if it in seconds}
        best = front(points)
        for it, (x, y) in points.items():
            spread = quality.deviation(it)
            colour = _OURS if it in best else _REST
            axes.errorbar(x, y, yerr=0 if spread != spread else spread, fmt="o", color=colour, capsize=3)
            axes.annotate(it, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.plot(*zip(*(points[it] for it in best), strict=True), color=_OURS, linewidth=1, alpha=0.6)
        axes.margins(x=0.25)
        axes.set_title(job)
        axes.set_xlabel("a training step, seconds")
        axes.set_ylabel("−(held-out loss)" if name == LOSS else name)
    with matplotlib.rc_context(_FORMAT):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
