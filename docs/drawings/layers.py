"""PEFT's time over ours by the number of rows, from the table of the CPU figures."""

from __future__ import annotations

import math
import re
from pathlib import Path

from docs.drawings.canvas import Drawing

TABLE = Path(__file__).parent.parent / "cpu.md"
ROWS = (1, 16, 128, 512, 2048)
SHAPES = {"576→576": "x", "576→1536": "y", "1536→576": "r"}
LOWEST, HIGHEST, MARKS = 0.9, 5.6, (1, 2, 3, 4, 5)
LEFT, TOP, WIDE, HIGH, APART = 46, 96, 148, 180, 26


def draw() -> Drawing:
    d = Drawing(
        736,
        346,
        "PEFT's time over ours on a CPU",
        "One layer, forward and backward, by rows, in float32 and bfloat16, without and with dropout.",
    )
    d.heading("PEFT's time over ours", "one layer, forward and backward, two threads, by the number of rows")
    for panel, (title, lines) in enumerate(ratios().items()):
        x0 = LEFT + panel * (WIDE + APART)
        d.text(x0, TOP - 14, title, bold=True, size=12)
        for mark in MARKS:
            d.line((x0, _y(mark)), (x0 + WIDE, _y(mark)), dashed=mark != 1)
            if panel == 0:
                d.text(x0 - 8, _y(mark) + 4, f"{mark}×", "quiet", anchor="end", size=12)
        for i, rows in enumerate(ROWS):
            d.text(_x(x0, i), TOP + HIGH + 18, str(rows), "quiet", anchor="middle", size=11)
        for shape, values in lines.items():
            points = [(_x(x0, i), _y(value)) for i, value in enumerate(values)]
            d.line(*points, kind=SHAPES[shape])
            for x, y in points:
                d.box(x - 3, y - 3, 6, 6, SHAPES[shape])
    d.text(LEFT + 2 * WIDE + 1.5 * APART, TOP + HIGH + 38, "rows", "quiet", anchor="middle", size=12)
    for i, (shape, kind) in enumerate(SHAPES.items()):
        d.box(LEFT + 110 * i, 328, 10, 10, kind)
        d.text(LEFT + 16 + 110 * i, 337, shape, "quiet", size=12)
    return d


def ratios() -> dict[str, dict[str, list[float]]]:
    """By the table's columns, then by shape, which stands in its first row: a ratio for each of ROWS."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| | rows |"))
    titles = [cell.strip() for cell in lines[start].strip("|").split("|")][2:]
    found: dict[str, dict[str, list[float]]] = {title: {} for title in titles}
    shape = ""
    for i, line in enumerate(lines[start + 2 : start + 2 + len(SHAPES) * len(ROWS)]):
        name, rows, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        shape = name.split()[-1] if name else shape
        if int(rows) != ROWS[i % len(ROWS)]:
            raise ValueError(f"{TABLE}: row {i} of the table is of {rows} rows, not of {ROWS[i % len(ROWS)]}")
        for title, cell in zip(titles, cells, strict=True):
            value = re.match(r"[\d.]+", cell)
            if value is None or not LOWEST < float(value[0]) < HIGHEST:
                raise ValueError(f"{TABLE}: {cell!r} is no ratio that the drawing shows")
            found[title].setdefault(shape, []).append(float(value[0]))
    return found


def _x(x0: float, i: int) -> float:
    return x0 + 10 + i * (WIDE - 20) / (len(ROWS) - 1)


def _y(ratio: float) -> float:
    share = math.log(ratio / LOWEST) / math.log(HIGHEST / LOWEST)
    return round(TOP + HIGH * (1 - share), 2)
