"""The picture of a run: both loss curves, and both sides' step times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.product_copy.results import Results, Spread

_OURS, _PEFT, _HELDOUT = "#0072b2", "#d55e00", "#222222"  # told apart by colour-blind eyes too


def draw(results: Results, path: Path) -> None:
    """Writes the picture as a PNG."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen
    losses, times = figure.subplots(1, 2, width_ratios=(4, 3))
    settings = results.settings
    figure.suptitle(f"{settings['model']} tuned on {settings['targets']}, on the CPU in float32")
    _draw_losses(losses, results)
    _draw_times(times, results)
    for axes in (losses, times):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_losses(axes: Any, results: Results) -> None:
    ours, peft = results.sides
    steps = range(1, len(ours.losses) + 1)
    # A broad line under a thin one: both are seen where they lie on each other.
    axes.plot(steps, ours.losses, color=_OURS, linewidth=5, alpha=0.45, label="fused_lora, training")
    axes.plot(steps, peft.losses, color=_PEFT, linewidth=1.4, label="PEFT, training")
    ends = [0, len(ours.losses) + 1]
    heldout = [ours.heldout_before, ours.heldout_after]
    theirs = [peft.heldout_before, peft.heldout_after]
    marks: dict[str, Any] = {"linestyle": "none", "zorder": 3}
    axes.plot(ends, heldout, "D", color=_HELDOUT, markersize=8, label="fused_lora, held out", **marks)
    axes.plot(ends, theirs, "o", color=_PEFT, markersize=3.5, label="PEFT, held out", **marks)
    for step, value in zip(ends, heldout, strict=True):
        axes.annotate(
            *(f"{value:.2f}", (step, value)),
            **{"xytext": (0, 11), "textcoords": "offset points", "ha": "center", "color": _HELDOUT},
        )
    axes.margins(x=0.06, y=0.1)
    difference = results.loss_difference
    said = f"differ by at most {difference:.1g}" if difference else "are identical to the bit"
    axes.set_title(f"Loss: the two sides {said}")
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss per token of copy")
    axes.legend(frameon=False)


def _draw_times(axes: Any, results: Results) -> None:
    for side, color, marker in zip(results.sides, (_OURS, _PEFT), "o^", strict=True):
        median = Spread.of(side.seconds).median
        steps = range(1, len(side.seconds) + 1)
        axes.scatter(
            *(steps, side.seconds),
            **{"color": color, "marker": marker, "s": 16, "alpha": 0.7, "linewidths": 0},
            label=f"{side.name}, median {median:.3g} s",
        )
        axes.axhline(median, color=color, linewidth=1, alpha=0.8)
    axes.set_ylim(bottom=0)
    axes.set_title(f"Step time: PEFT's is {results.ratio.median:.2f} × fused_lora's")
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, loc="lower right")
