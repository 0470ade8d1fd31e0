"""Tables as Markdown text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that is aligned in plain text too: the first column flush left, the others flush right."""
    cells = [list(headers), *map(list, rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headers))]
    lines = []
    for row in cells:
        first, *rest = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("| " + " | ".join([first, *rest]) + " |")
    rules = ("-" * (width + 1) + ":" if column else "-" * (width + 2) for column, width in enumerate(widths))
    lines.insert(1, "|" + "|".join(rules) + "|")
    return "\n".join(lines)
