"""The pytest session that runs a plan: hands out its cases, stores and tells what they gave."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.cpu import goals
from benchmarks.cpu.cases import Case
from benchmarks.cpu.plan import Plan
from benchmarks.cpu.results import Result, Store
from benchmarks.cpu.sides import AUTO, FROZEN, PEFT


class Session:
    """A plugin of pytest. cases: those that are still to be measured."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self._store = store
        self.cases = [case for case in plan.cases if store.lacks(case, plan.sides_of(case))]
        self._progress = Progress({case: plan.seconds(case) for case in self.cases})

    @pytest.fixture(scope="session")
    def session(self) -> Session:
        return self

    def took(self, result: Result) -> None:
        """Stores a case's result, and tells it."""
        self._store.add(result)
        told = self._progress.after(result.case)
        print(f"{told} {result.case}: {headline(result)}", flush=True)

    # Hooks

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("case", self.cases, ids=str)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed", "", "") if report.passed else None

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        machine_info.update(self._store.run)

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Beside this session's benchmarks all rows of the CSV, earlier sessions' too, and the goals."""
        output_json["results"] = self._store.rows()
        output_json["goals"] = [vars(goal) for goal in goals.evaluate(self._store.results)]


class Progress:
    """How much is done, and when the rest will be: guesses, scaled by what the done ones took."""

    def __init__(self, guesses: Mapping[Case, float]) -> None:
        self._left = dict(guesses)
        self._count = len(self._left)
        self._began = time.perf_counter()
        self._done = 0.0

    def after(self, case: Case) -> str:
        self._done += self._left.pop(case)
        scale = (time.perf_counter() - self._began) / self._done
        left = duration(scale * sum(self._left.values()))
        return f"[{self._count - len(self._left)}/{self._count}, {left} left]"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def headline(result: Result) -> str:
    """Auto beside PEFT and the frozen one."""
    over_peft, over_frozen = result.ratio(PEFT, AUTO), result.ratio(AUTO, FROZEN)
    parts = []
    if over_peft:
        parts.append(f"PEFT/auto {over_peft.median:.2f} ±{over_peft.noise:.0%}")
    if over_frozen:
        parts.append(f"auto/frozen {over_frozen.median:.2f} ±{over_frozen.noise:.0%}")
    return ", ".join(parts) or f"{sum(bool(it.seconds) for it in result.sides.values())} sides"
