"""Whether the claim held: per job, and within which noise.

The claim, of "Optimizing LoRA target module selection for efficient fine tuning" (Amazon Science, 19 March
2026): o_proj alone is the best trade of accuracy for cost; o_proj+fc2 is the choice where accuracy is
everything; adapting everything can be wasteful.

Noise: the runs of a job with one set of targets and different seeds differ by chance. Their variance is
pooled over the sets of targets, and two sets' means of n runs each are told apart where they differ by more
than

    t · s · √(2/n),    s² the pooled variance, t the 97.5 % point of Student's distribution

which chance alone exceeds in one of twenty comparisons. A set is dearer than another where its step takes
longer by more than the timings themselves vary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from scipy.stats import t as student

_Verdict = tuple[bool | None, str]  # as Statement has it: held, because
TRADE, BEST, ALL = "o_proj", "o_proj+fc2", "all"


@dataclass(frozen=True)
class Quality:
    """A job's scores, more is better: of each set of targets, of its runs with different seeds."""

    frozen: float
    runs: Mapping[str, Sequence[float]]

    def mean(self, targets: str) -> float:
        return statistics.fmean(self.runs[targets])

    def deviation(self, targets: str) -> float:
        runs = self.runs[targets]
        return statistics.stdev(runs) if len(runs) > 1 else math.nan

    @property
    def best(self) -> str:
        return max(self.runs, key=self.mean)

    def gain(self, targets: str) -> float:
        """The share of the best set's gain over the frozen model."""
        best = self.mean(self.best) - self.frozen
        return (self.mean(targets) - self.frozen) / best if best > 0 else math.nan

    @property
    def noise(self) -> float:
        """The least difference of two means that is not put down to chance; infinite for single runs."""
        groups = [runs for runs in self.runs.values() if len(runs) > 1]
        freedom = sum(len(runs) - 1 for runs in groups)
        if not freedom or len(groups) < len(self.runs):
            return math.inf
        variance = sum(statistics.variance(runs) * (len(runs) - 1) for runs in groups) / freedom
        fewest = min(map(len, groups))
        return float(student.ppf(0.975, freedom)) * math.sqrt(variance * 2 / fewest)


@dataclass(frozen=True)
class Statement:
    claim: str
    held: bool | None  # None: cannot be said
    because: str

    @property
    def verdict(self) -> str:
        return {True: "held", False: "did not hold", None: "cannot be said"}[self.held]

    def __str__(self) -> str:
        return f"{self.claim}: **{self.verdict}**. {self.because}"


def statements(quality: Quality, seconds: Mapping[str, float], timing_noise: float = 0.0) -> list[Statement]:
    """What the claim says of a job, and whether it was so. `seconds`: of a step, by set of targets;
    `timing_noise`: the share by which such times vary."""
    judges: dict[str, Callable[[], _Verdict]] = {}
    if TRADE in quality.runs:
        judges[f"{TRADE} alone is the best trade"] = partial(_best_trade, quality, seconds, timing_noise)
    if BEST in quality.runs:
        judges[f"{BEST} is the choice where accuracy is everything"] = partial(_most_accurate, quality)
    if ALL in quality.runs and BEST in quality.runs:
        judges["adapting everything is wasteful"] = partial(_all_is_wasteful, quality, seconds)
    unsaid = _why_nothing_can_be_said(quality)
    return [Statement(claim, *((None, unsaid) if unsaid else judge())) for claim, judge in judges.items()]


def _why_nothing_can_be_said(quality: Quality) -> str | None:
    if not math.isfinite(quality.noise):
        return "Without a second seed for each set there is no noise to judge by."
    gain = quality.mean(quality.best) - quality.frozen
    if gain <= quality.noise:
        return f"The best set's gain over the frozen model is {gain:.3g}: noise."
    return None


def _best_trade(quality: Quality, seconds: Mapping[str, float], timing_noise: float) -> _Verdict:
    if TRADE not in seconds:
        return None, "The cost of a step was not measured."
    own = quality.mean(TRADE)
    if own - quality.frozen <= quality.noise:
        return False, f"Its gain over the frozen model is {own - quality.frozen:.3g}: noise."
    dearest_alike = seconds[TRADE] * (1 + timing_noise)
    dearer = {name: cost for name, cost in seconds.items() if cost > dearest_alike}
    better = [
        name
        for name in quality.runs
        if name in seconds and name not in dearer and quality.mean(name) - own > quality.noise
    ]
    if better:
        alike = f"No dearer by more than {timing_noise:.0%}" if timing_noise else "No dearer"
        return False, f"{alike}, and better by more than noise: {', '.join(better)}."
    # A trade: what each further hundredth of a step's time buys, by the set that buys most.
    rate = {
        name: (quality.gain(name) - quality.gain(TRADE)) / (cost / seconds[TRADE] - 1)
        for name, cost in dearer.items()
        if name in quality.runs and quality.mean(name) - own > quality.noise
    }
    share = f"It has {quality.gain(TRADE):.0%} of the best set's gain"
    if not rate:
        return True, f"{share}, and no dearer set is better by more than noise."
    name = max(rate, key=rate.__getitem__)
    gain, time = quality.gain(name) - quality.gain(TRADE), seconds[name] / seconds[TRADE] - 1
    more = f"{name} buys {gain:.0%} more of it for {time:.0%} more time"
    return True, f"{share}, and nothing as cheap is better; {more}."


def _most_accurate(quality: Quality) -> _Verdict:
    own = quality.mean(BEST)
    better = [name for name in quality.runs if quality.mean(name) - own > quality.noise]
    if better:
        return False, f"Better by more than noise: {', '.join(better)}."
    return True, f"No set is better by more than noise (best mean: {quality.best})."


def _all_is_wasteful(quality: Quality, seconds: Mapping[str, float]) -> _Verdict:
    more = quality.mean(ALL) - quality.mean(BEST)
    cost = (
        f", for {seconds[ALL] / seconds[BEST] - 1:+.0%} of a step's time"
        if {ALL, BEST} <= seconds.keys()
        else ""
    )
    if more > quality.noise:
        return False, f"It is better than {BEST} by {more:.3g}{cost}."
    return True, f"It is not better than {BEST} by more than noise ({more:+.3g}){cost}."


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the (cost, quality) points that no other beats in one without losing in the other."""
    kept: list[str] = []
    for name, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not kept or quality > points[kept[-1]][1]:
            kept.append(name)
    return kept
