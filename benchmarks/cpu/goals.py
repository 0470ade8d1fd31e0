"""The goals of the CPU path, evaluated from results. A goal of many shapes names the worst of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cpu.cases import BOTH, DECODE_ROWS, FORWARD, SMOLLM2, STEP, Case
from benchmarks.cpu.results import Result, geometric_mean
from benchmarks.cpu.sides import (
    AUTO,
    FROZEN,
    MASTERS,
    NO_DROPOUT,
    PACKED,
    PEAK,
    PEFT,
    PEFT_COMPILED,
    PEFT_DEFAULT,
)
from benchmarks.cpu.turns import Spread, paired

RANK = 16  # of the goals that name one
WIDE = 2048  # features, of the goals that tell wide layers from others
HEADERS = ("goal", "wanted", "found", "shapes", "the worst of them, with its quartiles", "reached")


@dataclass(frozen=True)
class Goal:
    """What is wanted, what was found; reached is None where nothing of it was measured."""

    name: str
    wanted: str
    found: str = "not measured"
    shapes: int = 0
    worst: str = ""
    reached: bool | None = None

    def row(self) -> list[str]:
        reached = "–" if self.reached is None else "yes" if self.reached else "no"
        return [self.name, self.wanted, self.found, str(self.shapes), self.worst, reached]


Ratios = list[tuple[Case, Spread]]
Filter = Callable[[Case], bool]


def evaluate(results: Sequence[Result]) -> list[Goal]:
    layers = [it for it in results if not it.case.whole_model]

    def of(numerator: str, denominator: str, wanted: Filter) -> Ratios:
        chosen = ((it.case, it.ratio(numerator, denominator)) for it in layers if wanted(it.case))
        return [(case, spread) for case, spread in chosen if spread is not None]

    def small(dropout: float) -> Filter:
        return lambda c: (
            c.half == BOTH and c.rank == RANK and c.dropout == dropout and c.layer.model == SMOLLM2
        )

    def decode(c: Case) -> bool:
        return c.half == FORWARD and c.rows <= DECODE_ROWS and c.dtype == "bfloat16" and not c.dropout

    both = f"forward + backward, {SMOLLM2}, r={RANK}"
    goals = [
        _never(f"never slower than {theirs}: its time over {ours}'s", of(theirs, ours, lambda c: True))
        for theirs, ours in (
            (PEFT, AUTO),
            (PEFT_DEFAULT, AUTO),
            (PEFT_DEFAULT, MASTERS),
            (PEFT_COMPILED, AUTO),
        )
    ]
    for dropout, theirs, ours, least in (
        (0.0, PEFT, AUTO, 1.8),
        (0.0, PEFT_DEFAULT, AUTO, 2.2),
        (0.0, PEFT_DEFAULT, MASTERS, 2.2),
        (0.1, PEFT, AUTO, 2.2),
    ):
        name = f"{both}, dropout {dropout:g}: {theirs} over {ours}"
        goals.append(_mean(name, of(theirs, ours, small(dropout)), least))
    for dropout in (0.0, 0.1):
        ratios = of(
            AUTO,
            FROZEN,
            lambda c, p=dropout: c.half == BOTH and c.rank == RANK and c.dropout == p,  # type: ignore[misc]
        )
        name = f"forward + backward, r={RANK}, dropout {dropout:g}: {AUTO} over the frozen linear"
        goals.append(_share(name, ratios, most=1.0, least_share=0.8))
    for ours, least in ((PACKED, 3.5), (AUTO, 2.0)):
        name = f"forward, bfloat16, at most {DECODE_ROWS} rows: {PEFT} over {ours}"
        goals.append(_mean(name, of(PEFT, ours, decode), least))
    goals.append(_of_peak(layers))
    for wide, most in ((True, 1.05), (False, 1.1)):
        size = f"K and N {'≥' if wide else 'not both ≥'} {WIDE}"
        ratios = of(AUTO, NO_DROPOUT, lambda c, w=wide: c.half == BOTH and _is_wide(c) == w)  # type: ignore[misc]
        name = f"forward + backward, {size}: {AUTO} with dropout over {AUTO} without"
        goals.append(_within(name, ratios, most))
    models = [it for it in results if it.case.half == STEP]
    for dtype, least in (("float32", 1.35), ("bfloat16", 1.2)):
        chosen = [it for it in models if it.case.layer.name == "all" and it.case.dtype == dtype]
        pairs = [(it.case, it.ratio(PEFT, AUTO)) for it in chosen]
        ratios = [(case, spread) for case, spread in pairs if spread is not None]
        goals.append(_mean(f"training step, all projections, {dtype}: {PEFT} over {AUTO}", ratios, least))
    chosen = [it for it in models if it.case.layer.name in ("o_proj", "o_proj+fc2")]
    pairs = [(it.case, it.ratio(FROZEN, AUTO)) for it in chosen]
    ratios = [(case, spread) for case, spread in pairs if spread is not None]
    name = "training step, o_proj and o_proj+fc2: the frozen model's time over auto's"
    goals.append(_never(name, ratios))
    return goals


def _is_wide(case: Case) -> bool:
    return min(case.layer.in_features, case.layer.out_features) >= WIDE


def _never(name: str, ratios: Ratios, least: float = 1.0) -> Goal:
    """At least so much for every shape. How many miss it, and how many by more than their own spread."""
    wanted = f"≥ {least:g}, each"
    if not ratios:
        return Goal(name, wanted)
    below = [spread for _, spread in ratios if spread.median < least]
    surely = sum(spread.high < least for spread in below)
    found = f"{len(below)} below, {surely} of them with both quartiles"
    return Goal(name, wanted, found, len(ratios), _lowest(ratios), not below)


def _mean(name: str, ratios: Ratios, least: float) -> Goal:
    wanted = f"geometric mean ≥ {least:g}"
    if not ratios:
        return Goal(name, wanted)
    mean = geometric_mean([spread.median for _, spread in ratios])
    return Goal(name, wanted, f"{mean:.2f}", len(ratios), _lowest(ratios), mean >= least)


def _share(name: str, ratios: Ratios, *, most: float, least_share: float) -> Goal:
    """At most so much for a share of the shapes."""
    wanted = f"≤ {most:g} for {'all' if least_share == 1 else f'{least_share:.0%}'}"
    if not ratios:
        return Goal(name, wanted)
    medians = [spread.median for _, spread in ratios]
    share = sum(median <= most for median in medians) / len(medians)
    found = f"{share:.0%}; geometric mean {geometric_mean(medians):.2f}"
    case, spread = max(ratios, key=lambda ratio: ratio[1].median)
    return Goal(name, wanted, found, len(ratios), _told(case, spread), share >= least_share)


def _of_peak(results: Sequence[Result], least: float = 0.85) -> Goal:
    """The flops a second of auto over those of the GEMM that took its turns beside it."""
    ratios = []
    for it in results:
        case, auto, gemm = it.case, it.sides.get(AUTO), it.sides.get(PEAK)
        fits = case.half == BOTH and case.rank == RANK and not case.dropout and case.rows >= 128
        if fits and auto and gemm and auto.seconds and gemm.seconds and auto.flops and gemm.flops:
            scale = auto.flops / gemm.flops
            ratios.append((case, paired([scale * s for s in gemm.seconds], auto.seconds)))
    name = f"forward + backward, r={RANK}, dropout 0, ≥ 128 rows: {AUTO}'s share of the GEMM peak, all flops"
    wanted = f"geometric mean ≥ {least:.0%}"
    if not ratios:
        return Goal(name, wanted)
    medians = [spread.median for _, spread in ratios]
    reaching = sum(median >= least for median in medians)
    mean = geometric_mean(medians)
    found = f"{mean:.0%}; {reaching} shapes reach it"
    return Goal(name, wanted, found, len(ratios), _lowest(ratios), mean >= least)


def _within(name: str, ratios: Ratios, most: float) -> Goal:
    """At most so much in the geometric mean."""
    wanted = f"geometric mean ≤ {most:g}"
    if not ratios:
        return Goal(name, wanted)
    mean = geometric_mean([spread.median for _, spread in ratios])
    worst = max(ratios, key=lambda ratio: ratio[1].median)
    return Goal(name, wanted, f"{mean:.2f}", len(ratios), _told(*worst), mean <= most)


def _lowest(ratios: Ratios) -> str:
    return _told(*min(ratios, key=lambda ratio: ratio[1].median))


def _told(case: Case, spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f}): {case}"
