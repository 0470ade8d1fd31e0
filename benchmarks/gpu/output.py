"""Writes results as a table, as CSV and as a plot, the device's name in each."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

from benchmarks.gpu.results import Row, Run
from benchmarks.gpu.sides import FROZEN, FUSED, SIDES
from benchmarks.tables import markdown


def write(run: Run, rows: Sequence[Row], notes: Iterable[str], directory: Path) -> list[Path]:
    """The files, in a directory that is made."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", run.device.lower()).strip("-")
    paths = [directory / f"{stem}{suffix}" for suffix in (".md", ".csv", ".png")]
    paths[0].write_text(table(run, rows, notes) + "\n")
    write_csv(run, rows, paths[1])
    plot(run, rows, paths[2])
    return paths


def table(run: Run, rows: Sequence[Row], notes: Iterable[str] = ()) -> str:
    lines = [
        f"# {run.device}",
        f"compute capability {run.capability}, torch {run.torch}, CUDA {run.cuda}, PEFT {run.peft}, "
        f"fused-lora {run.fused_lora} ({run.commit}), {run.date}",
        "",
        "Frozen and fused: median µs. The others: their time over the fused kernels', the median of paired "
        "ratios (quartiles). TFLOP/s are of the frozen products.",
    ]
    for title, group in grouped(rows):
        headers, body = _group_table(group)
        lines += ["", f"## {title}", "", markdown(headers, body)]
    notes = list(dict.fromkeys(notes))
    if notes:
        lines += ["", "Not measured:", *(f"- {note}" for note in notes)]
    return "\n".join(lines)


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one half, dtype, dropout and mode together, titled."""

    def title(row: Row) -> str:
        dropout = f", dropout {row.dropout:g}" if row.half != "forward" else ""
        return f"{row.half}, {row.dtype}, r={row.shape.rank}{dropout}, {row.mode}"

    return [(key, list(group)) for key, group in groupby(rows, key=title)]


def _group_table(group: list[Row]) -> tuple[list[str], list[list[str]]]:
    present = {row.side for row in group}
    others = [side for side in SIDES if side in present and side not in (FROZEN, FUSED)]
    headers = [
        "shape",
        "frozen µs",
        "fused µs",
        "fused TFLOP/s",
        "frozen/fused",
        *(f"{o}/fused" for o in others),
    ]
    body = []
    for shape, members in groupby(group, key=lambda row: row.shape):
        by_side = {row.side: row for row in members}
        frozen, fused = by_side.get(FROZEN), by_side.get(FUSED)
        body.append(
            [
                f"{shape.name} {shape}",
                f"{frozen.microseconds:.1f}" if frozen else "–",
                f"{fused.microseconds:.1f}" if fused else "–",
                f"{fused.tflops:.1f}" if fused else "–",
                *(_ratio(by_side.get(side)) for side in (FROZEN, *others)),
            ]
        )
    return headers, body


def _ratio(row: Row | None) -> str:
    if row is None or math.isnan(row.over_fused):
        return "–"
    return f"{row.over_fused:.2f} ({row.over_fused_low:.2f}–{row.over_fused_high:.2f})"


def write_csv(run: Run, rows: Sequence[Row], path: Path) -> None:
    """A line for each side and shape, with all that is known of the run in it."""
    flat = []
    for row in rows:
        cells = {field.name: getattr(row, field.name) for field in fields(row) if field.name != "shape"}
        shape = asdict(row.shape)
        shape["shape"] = shape.pop("name")
        shape["m"] = shape.pop("rows")
        flat.append({**asdict(run), **shape, **cells})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]) if flat else ["device"])
        writer.writeheader()
        writer.writerows(flat)


def plot(run: Run, rows: Sequence[Row], path: Path) -> None:
    """For each group of rows: every side's time over the frozen linear's, by shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(rows) or [("nothing was measured", [])]
    width = max(8, 0.5 + 0.9 * max(len({row.shape for row in group}) for _, group in groups))
    figure, all_axes = pyplot.subplots(
        len(groups), 1, figsize=(width, 4 * len(groups)), squeeze=False, layout="constrained"
    )
    figure.suptitle(f"{run.device}, torch {run.torch}, fused-lora {run.fused_lora} ({run.commit})")
    for axes, (title, group) in zip(all_axes[:, 0], groups, strict=True):
        shapes = list(dict.fromkeys(row.shape for row in group))
        sides = [side for side in SIDES if side != FROZEN and any(row.side == side for row in group)]
        for index, side in enumerate(sides):
            bars = [(shapes.index(row.shape), row.over_frozen) for row in group if row.side == side]
            offset = (index - (len(sides) - 1) / 2) * 0.8 / len(sides)
            axes.bar([x + offset for x, _ in bars], [y for _, y in bars], 0.8 / len(sides), label=side)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(
            range(len(shapes)), [str(shape) for shape in shapes], rotation=60, ha="right", fontsize=7
        )
        axes.set_ylabel("time over the frozen linear's")
        axes.set_title(title)
        if sides:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
