"""Results as plots, in PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.cpu.cases import BOTH, FORWARD
from benchmarks.cpu.output import grouped, present
from benchmarks.cpu.results import Result
from benchmarks.cpu.sides import (
    ADDMM,
    AUTO,
    COMPOSED,
    FROZEN,
    FUSED,
    MASTERS,
    PACKED,
    PEFT,
    PEFT_COMPILED,
    PEFT_DEFAULT,
    RUNLORA,
)
from benchmarks.cpu.turns import Spread

matplotlib.use("Agg")
from matplotlib import pyplot

# PEFT's are reds, ours blues; those of others brown and grey. Sides that only serve a goal are not drawn.
COLOURS = {
    FROZEN: "black",
    PEFT: "tab:red",
    PEFT_DEFAULT: "tab:orange",
    PEFT_COMPILED: "tab:pink",
    ADDMM: "tab:brown",
    RUNLORA: "tab:gray",
    COMPOSED: "tab:purple",
    FUSED: "tab:cyan",
    AUTO: "tab:blue",
    MASTERS: "tab:green",
    PACKED: "tab:olive",
}

Measure = Callable[[Result, str], "float | None"]

RATIOS: tuple[tuple[str, str, Measure], ...] = (
    ("over-frozen", "time over the frozen linear's", lambda it, side: _median(it.ratio(side, FROZEN))),
    ("peft-over", "PEFT's time over the side's", lambda it, side: _median(it.ratio(PEFT, side))),
)
MEMORY: tuple[tuple[str, str, Measure], ...] = (
    ("saved", "KiB saved for backward", lambda it, side: _kib(it.sides[side].saved_bytes)),
    ("peak", "KiB at the peak of a forward and backward", lambda it, side: _kib(it.sides[side].peak_bytes)),
)


def draw(directory: Path, run: Mapping[str, str], results: Sequence[Result]) -> list[Path]:
    """A picture for each measure, half, rank and number of threads (memory does not depend on that), and one
    of the whole model."""
    layers = [it for it in results if it.case.of_one_layer]
    written = []
    for (half, rank, threads), group in grouped(layers, lambda c: (c.half, c.rank, c.threads)):
        slug = "forward" if half == FORWARD else "forward-backward"
        for stem, label, measure in RATIOS:
            path = directory / f"{stem}-{slug}-r{rank}-threads{threads}.png"
            title = f"{half}, r={rank}, threads {threads}: {label}"
            _layers_picture(path, f"{title}\n{_signature(run)}", group, measure, reference=True)
            written.append(path)
    for rank, group in grouped([it for it in layers if it.case.half == BOTH], lambda c: c.rank):
        one = [it for it in group if it.case.threads == group[0].case.threads]
        for stem, label, measure in MEMORY:
            path = directory / f"{stem}-r{rank}.png"
            _layers_picture(path, f"r={rank}: {label}\n{_signature(run)}", one, measure, reference=False)
            written.append(path)
    models = [it for it in results if it.case.whole_model]
    if models:
        written.append(directory / "model.png")
        _model_picture(written[-1], f"SmolLM2-135M: time over the frozen model's\n{_signature(run)}", models)
    return written


def _layers_picture(
    path: Path, title: str, results: Sequence[Result], measure: Measure, *, reference: bool
) -> None:
    """A panel a layer, and a dtype and dropout; in it the rows along x, and a line a side."""
    layers = list(dict.fromkeys(it.case.layer for it in results))
    kinds = list(dict.fromkeys((it.case.dtype, it.case.dropout) for it in results))
    size = (3.2 * len(layers) + 2, 2.4 * len(kinds) + 1)
    figure, panels = pyplot.subplots(
        len(kinds), len(layers), figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    figure.suptitle(title, fontsize=9)
    drawn: dict[str, Any] = {}
    for line, kind in enumerate(kinds):
        for column, layer in enumerate(layers):
            found = [
                it for it in results if (it.case.layer, it.case.dtype, it.case.dropout) == (layer, *kind)
            ]
            panel = panels[line, column]
            drawn.update(_panel(panel, found, measure))
            panel.set_title(f"{layer.model} {layer}, {kind[0]}, dropout {kind[1]:g}", fontsize=7)
            if reference:
                panel.axhline(1, color="black", linewidth=0.6)
            if line == len(kinds) - 1:
                panel.set_xlabel("rows", fontsize=7)
    shown = [side for side in COLOURS if side in drawn]
    figure.legend([drawn[side] for side in shown], shown, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, results: Sequence[Result], measure: Measure) -> dict[str, Any]:
    """Draws the sides' lines, and returns them."""
    lines = {}
    for side in (side for side in present(results) if side in COLOURS):
        points = [(it.case.rows, measure(it, side)) for it in results if side in it.sides]
        drawn = sorted((rows, value) for rows, value in points if value)
        if drawn:
            width = 2.2 if side == AUTO else 1
            (lines[side],) = panel.plot(*zip(*drawn, strict=True), ".-", color=COLOURS[side], linewidth=width)
    panel.set_xscale("log", base=2)
    rows = sorted({it.case.rows for it in results})
    panel.set_xticks(rows, [str(m) for m in rows])
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.tick_params(labelsize=6)
    return lines


def _model_picture(path: Path, title: str, results: Sequence[Result]) -> None:
    """A panel for step and decoding, each dtype, rank and number of threads; a bar a target set and side."""
    groups = grouped(results, lambda c: (c.half, c.dtype, c.rank, c.threads))
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(3.6 * len(groups), 3.6), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=9)
    for panel, ((half, dtype, rank, threads), group) in zip(panels[0], groups, strict=True):
        sides = present(group, without=(FROZEN,))
        for index, side in enumerate(sides):
            heights = [_median(it.ratio(side, FROZEN)) or 0.0 for it in group]
            offset = (index - (len(sides) - 1) / 2) * 0.8 / len(sides)
            places = [place + offset for place in range(len(group))]
            panel.bar(places, heights, 0.8 / len(sides), label=side, color=COLOURS[side])
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set_xticks(range(len(group)), [it.case.layer.name for it in group], fontsize=7)
        panel.set_title(f"{half}, {dtype}, r={rank}, threads {threads}", fontsize=7)
        panel.tick_params(labelsize=6)
        panel.legend(fontsize=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _median(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


def _kib(value: int | None) -> float | None:
    return None if value is None else value / 2**10


def _signature(run: Mapping[str, str]) -> str:
    versions = f"torch {run['torch']}, PEFT {run['peft']}, fused-lora {run['fused_lora']} ({run['commit']})"
    return f"{run['processor']}, {versions}"
