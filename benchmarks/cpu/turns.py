"""Sides that take turns in one process, and the ratios of their times within a round.

The speed of a machine drifts by more than what is to be seen; what drifts, drifts for all sides of a round.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

GROUP_SECONDS = 2e-3  # calls are timed in groups of this length at least
LEAST_ROUNDS = 5


@dataclass
class Side:
    """A step, and the context in which it is called. That is entered outside the clock: a training loop
    enters autocast once a step, not once a layer."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    note: str = ""


class Turns:
    """Rounds of groups of calls. Each is in an order drawn anew, from a fixed seed, and every second one in
    the reverse of the one before: no side is met more often late than early, nor in the caches' state that
    the same other one leaves."""

    def __init__(self, sides: Mapping[str, Side], clock: Callable[[], float] = time.perf_counter) -> None:
        self.sides = dict(sides)
        self.seconds: dict[str, list[float]] = {name: [] for name in sides}  # of one call, round by round
        self.calls = dict.fromkeys(sides, 1)
        self._clock = clock
        self._draw = random.Random(0)
        self._backwards: list[str] = []  # the next round, where it is the reverse of the last

    def calibrate(self) -> float:
        """Sets how many calls make a group, from warm ones; returns the seconds of a round."""
        total = 0.0
        for name in self.sides:
            seconds = self._group(name, 1)
            if seconds < GROUP_SECONDS:  # one call is too short to be timed
                seconds = self._group(name, max(1, min(64, int(GROUP_SECONDS / 4 / max(seconds, 1e-7)))))
            self.calls[name] = max(1, math.ceil(GROUP_SECONDS / max(seconds, 1e-7)))
            total += self.calls[name] * seconds
        return total

    def round(self) -> None:
        for name in self.order():
            self.seconds[name].append(self._group(name, self.calls[name]))

    def order(self) -> list[str]:
        """The next round's."""
        if self._backwards:
            names, self._backwards = self._backwards, []
            return names
        names = list(self.sides)
        self._draw.shuffle(names)
        self._backwards = names[::-1]
        return names

    def _group(self, name: str, calls: int) -> float:
        """Seconds of one call among `calls`."""
        side = self.sides[name]
        call = side.call
        with side.context():
            began = self._clock()
            for _ in range(calls):
                call()
            return (self._clock() - began) / calls


def rounds_within(budget: float, round_seconds: float, most: int) -> int:
    return max(min(LEAST_ROUNDS, most), min(most, int(budget / round_seconds)))


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        return Spread(*statistics.quantiles(values, n=4, method="inclusive"))

    @property
    def noise(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of the rounds' own ratios."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])
