"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.cpu import goals
from benchmarks.cpu.cases import BATCH, BOTH, DECODE_ROWS, DECODED, STEP, TOKENS, Case
from benchmarks.cpu.results import Result, geometric_mean
from benchmarks.cpu.sides import (
    AUTO,
    EXPLANATIONS,
    FROZEN,
    NO_DROPOUT,
    PEAK,
    PEFT,
    SIDES,
)
from benchmarks.cpu.turns import Spread
from benchmarks.tables import markdown


def summary(run: Mapping[str, str], results: Sequence[Result]) -> str:
    parts = [
        "# LoRA linears on a CPU",
        ", ".join(f"{name.replace('_', '-')} {value}" for name, value in run.items()),
        "Sides take turns in one process; a ratio is the median of the rounds' own ratios, in brackets its "
        "quartiles.",
        "Weights are as a loop over one layer leaves them: SmolLM2's stay in the cache, which flatters "
        f"all sides at {DECODE_ROWS} rows and fewer; Llama-2-7B's do not fit in one.",
        "## Goals",
        markdown(goals.HEADERS, [goal.row() for goal in goals.evaluate(results)]),
    ]
    layers = [it for it in results if it.case.of_one_layer]
    models = [it for it in results if it.case.whole_model]
    if layers:
        parts += ["## Layers, geometric means over shapes: the side's time over auto's", _means(layers)]
    if models:
        parts += ["## The whole model, SmolLM2-135M", _models(models)]
    return "\n\n".join(parts)


def details(results: Sequence[Result]) -> str:
    """Every shape."""
    layers = [it for it in results if not it.case.whole_model]
    parts = ["## Sides", "\n".join(f"- {name}: {said}" for name, said in EXPLANATIONS.items())]
    for key, group in grouped(layers, lambda c: (c.half, c.dtype, c.dropout, c.rank, c.threads)):
        half, dtype, dropout, rank, threads = key
        shared = f"{dtype}, dropout {dropout:g}, r={rank}, threads {threads}"
        parts += [
            f"## {half}, {shared}: time over the frozen linear's",
            _table(group, FROZEN, over=True),
            f"## {half}, {shared}: PEFT's time over the side's",
            _table(group, PEFT, over=False),
        ]
    memory = [it for it in results if it.case.half in (BOTH, STEP)]
    for key, group in grouped(memory, lambda c: (c.half, c.dtype, c.dropout, c.rank)):
        half, dtype, dropout, rank = key
        one = [it for it in group if it.case.threads == group[0].case.threads]
        parts += [
            f"## Memory, {half}, {dtype}, dropout {dropout:g}, r={rank}: KiB saved / at the peak",
            _memory_table(one),
        ]
    absent = {
        f"- {side}: {it.note}" for result in results for side, it in result.sides.items() if not it.seconds
    }
    if absent:
        parts += ["## Absent", "\n".join(sorted(absent))]
    return "\n\n".join(parts)


def grouped(results: Sequence[Result], key: Callable[[Case], Any]) -> list[tuple[Any, list[Result]]]:
    """Results of the same key together, by key."""

    def of(result: Result) -> Any:
        return key(result.case)

    return [(k, list(group)) for k, group in groupby(sorted(results, key=of), key=of)]


def present(results: Iterable[Result], without: Sequence[str] = ()) -> list[str]:
    """The sides that have times, in their order."""
    timed = {side for result in results for side, it in result.sides.items() if it.seconds}
    return [side for side in SIDES if side in timed and side not in without]


def _shape(case: Case) -> list[str]:
    return [f"{case.layer.model} {case.layer}", str(case.rows)]


def _told(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"


def _table(results: Sequence[Result], reference: str, *, over: bool) -> str:
    """Each side's time over the reference's, or the other way round; the reference's own in µs."""
    sides = present(results, without=(reference, PEAK))
    rows = []
    for it in results:
        own = it.sides[reference].seconds if reference in it.sides else ()
        time = Spread.of(own) if own else None
        shown = "–" if time is None else f"{1e6 * time.median:.0f} ±{time.noise:.0%}"
        pairs = ((side, reference) if over else (reference, side) for side in sides)
        rows.append([*_shape(it.case), shown, *(_told(it.ratio(*pair)) for pair in pairs)])
    return markdown(["shape", "rows", f"{reference} µs", *sides], rows)


def _memory_table(results: Sequence[Result]) -> str:
    sides = present(results, without=(PEAK, NO_DROPOUT))

    def kib(value: int | None) -> str:
        return "–" if value is None else f"{value / 1024:.0f}"

    rows = []
    for it in results:
        cells = (it.sides.get(side) for side in sides)
        told = (f"{kib(cell.saved_bytes)} / {kib(cell.peak_bytes)}" if cell else "–" for cell in cells)
        rows.append([*_shape(it.case), *told])
    return markdown(["shape", "rows", *sides], rows)


def _means(results: Sequence[Result]) -> str:
    sides = present(results, without=(AUTO, PEAK))
    rows = []
    for key, group in grouped(results, lambda c: (c.half, c.dtype, c.dropout, c.threads)):
        half, dtype, dropout, threads = key
        means = []
        for side in sides:
            ratios = [spread.median for it in group if (spread := it.ratio(side, AUTO))]
            means.append(f"{geometric_mean(ratios):.2f}" if ratios else "–")
        rows.append([half, dtype, f"{dropout:g}", str(threads), str(len(group)), *means])
    return markdown(["half", "dtype", "dropout", "threads", "shapes", *sides], rows)


def _models(results: Sequence[Result]) -> str:
    sides = present(results)
    headers = ["targets", "what", "r", "dtype", "threads"]
    for side in sides:
        headers.append(f"{side}, tokens/s")
        headers += [f"{side}/frozen"] if side != FROZEN else []
        headers += [f"PEFT/{side}"] if side not in (FROZEN, PEFT) else []
    rows = []
    for it in results:
        case = it.case
        tokens = BATCH * TOKENS if case.half == STEP else DECODED
        row = [case.layer.name, case.half, str(case.rank), case.dtype, str(case.threads)]
        for side in sides:
            seconds = it.sides[side].seconds if side in it.sides else ()
            row.append(f"{tokens / Spread.of(seconds).median:.1f}" if seconds else "–")
            row += [_told(it.ratio(side, FROZEN))] if side != FROZEN else []
            row += [_told(it.ratio(PEFT, side))] if side not in (FROZEN, PEFT) else []
        rows.append(row)
    return markdown(headers, rows)
