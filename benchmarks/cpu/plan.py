"""What a run measures: its cases, the sides of each, and how long it means to take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.cpu import batches, models, sides
from benchmarks.cpu.cases import BOTH, DECODING, STEP, Case
from benchmarks.cpu.turns import LEAST_ROUNDS

PEAK_ROWS = 128
# Compiling takes seconds for each shape, so a short run does it for a few.
SHORT_COMPILED_ROWS = (512,)
# Of a guess: seconds to build a case and to compile, and flops a second of a thread.
_BUILD, _COMPILE, _RATE = 0.15, 2.5, 6e10
_UNTIMED_CALLS = 3
_MODEL_FLOPS = {STEP: 2.5e11, DECODING: 2e11}


@dataclass(frozen=True)
class Plan:
    cases: Sequence[Case]
    rounds: int  # at most
    budget: float  # seconds of a case's rounds, where the least number of rounds does not take longer
    sides: Collection[str] = sides.SIDES
    compile_all: bool = True

    def sides_of(self, case: Case) -> list[str]:
        """The sides that a case has a row for."""
        if case.whole_model:
            return [name for name in models.sides_of(case.half) if name in self.sides]
        if not case.of_one_layer:
            return [name for name in batches.SIDES[case.half] if name in self.sides]
        return [name for name in sides.OF_A_LAYER if name in self.sides and self._wants(name, case)]

    def _wants(self, side: str, case: Case) -> bool:
        if side == sides.PEAK:
            return case.half == BOTH and case.rows >= PEAK_ROWS
        if side == sides.PEFT_COMPILED and not self.compile_all:
            most = max(it.threads for it in self.cases)
            return case.half == BOTH and case.threads == most and case.rows in SHORT_COMPILED_ROWS
        return True

    def seconds(self, case: Case) -> float:
        """A guess, for the estimate of what remains."""
        wanted = self.sides_of(case)
        flops = case.flops if not case.whole_model else _MODEL_FLOPS[case.half]
        rate = _RATE * case.threads * (2 if case.dtype == "bfloat16" else 1)
        round_seconds = len(wanted) * flops / rate
        least = min(self.rounds, LEAST_ROUNDS)
        compiling = _COMPILE if sides.PEFT_COMPILED in wanted else 0.0
        timed = max(least * round_seconds, min(self.budget, self.rounds * max(round_seconds, 0.03)))
        return _BUILD + compiling + _UNTIMED_CALLS * round_seconds + timed
