"""What was measured, kept in one CSV file as it comes: a row for each side of each case.

A row has the seconds of every round, so that whatever is said later (a ratio of two sides, its quartiles)
comes from the file, and an interrupted run can go on.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cpu.cases import Case
from benchmarks.cpu.sides import FROZEN, PEFT
from benchmarks.cpu.turns import Spread, paired


@dataclass(frozen=True)
class Measured:
    """One side: seconds of a call, round by round; none of them where it is absent, which `note` explains."""

    seconds: tuple[float, ...] = ()
    flops: float | None = None  # that the result needs, however it is computed
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    case: Case
    sides: dict[str, Measured]

    def ratio(self, numerator: str, denominator: str) -> Spread | None:
        """Of the two sides' times, paired by round; None where one is absent."""
        taken = [self.sides[name].seconds if name in self.sides else () for name in (numerator, denominator)]
        return paired(*taken) if all(taken) else None

    def rows(self) -> list[dict[str, object]]:
        return [{**self.case.cells(), "side": side, **self._cells(side)} for side in self.sides]

    def _cells(self, side: str) -> dict[str, object]:
        it = self.sides[side]
        cells: dict[str, object] = {"rounds": len(it.seconds)}
        time = Spread.of(it.seconds) if it.seconds else None
        for name, spread, unit in (
            ("microseconds", time, 1e6),
            ("time_over_frozen", self.ratio(side, FROZEN), 1.0),
            ("speedup_over_peft", self.ratio(PEFT, side), 1.0),
        ):
            for suffix, of in (("", "median"), ("_low", "low"), ("_high", "high")):
                cells[name + suffix] = "" if spread is None else f"{unit * getattr(spread, of):.5g}"
        cells["flops"] = "" if it.flops is None else f"{it.flops:.0f}"
        cells["gflops_per_second"] = f"{it.flops / time.median * 1e-9:.4g}" if time and it.flops else ""
        cells["saved_bytes"] = "" if it.saved_bytes is None else it.saved_bytes
        cells["peak_bytes"] = "" if it.peak_bytes is None else it.peak_bytes
        cells["note"] = it.note
        cells["seconds"] = " ".join(map(repr, it.seconds))
        return cells


@dataclass
class Store:
    """The results of a run, in memory and in the file; `run` says where and with what they were measured."""

    path: Path
    run: Mapping[str, str]
    _by_case: dict[Case, Result] = field(default_factory=dict)

    @property
    def results(self) -> list[Result]:
        return list(self._by_case.values())

    @staticmethod
    def begin(path: Path, run: Mapping[str, str]) -> Store:
        """A new file. One that is there is kept beside it, as the previous one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_name(f"previous-{path.name}"))
        return Store(path, run)

    @staticmethod
    def resume(path: Path, run: Mapping[str, str]) -> Store:
        """The file of a run that was interrupted; a new one where there is none.

        Raises ValueError where it was measured elsewhere or with something else: those figures do not mix.
        """
        if not path.exists():
            return Store.begin(path, run)
        store = Store(path, run)
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # the last line may have been cut
        measured: dict[Case, dict[str, Measured]] = {}
        for row in csv.DictReader(io.StringIO(whole, newline="")):
            for name, value in run.items():
                if row.get(name) != value:
                    raise ValueError(
                        f"{path} cannot be resumed: its {name} is {row.get(name)!r}, and now it is {value!r}"
                    )
            measured.setdefault(Case.of_cells(row), {})[row["side"]] = _measured(row)
        store._by_case = {case: Result(case, sides) for case, sides in measured.items()}
        return store

    def lacks(self, case: Case, sides: Collection[str]) -> bool:
        """Whether some of the sides have no row yet, not even one that says why they are absent."""
        found = self._by_case.get(case)
        return found is None or not set(sides) <= set(found.sides)

    def drop(self, cases: Iterable[Case]) -> None:
        """Forgets what there is of cases that are to be measured, whole."""
        for case in cases:
            self._by_case.pop(case, None)
        self.path.write_text("", encoding="utf-8")
        self._append(self.results)

    def add(self, result: Result) -> None:
        self._by_case[result.case] = result
        self._append([result])

    def rows(self) -> list[dict[str, object]]:
        return [{**self.run, **row} for result in self.results for row in result.rows()]

    def _append(self, results: Sequence[Result]) -> None:
        rows = [{**self.run, **row} for result in results for row in result.rows()]
        if not rows:
            return
        empty = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if empty:
                writer.writeheader()
            writer.writerows(rows)


def _measured(row: Mapping[str, str]) -> Measured:
    def whole(name: str) -> int | None:
        return int(row[name]) if row[name] else None

    return Measured(
        tuple(map(float, row["seconds"].split())),
        float(row["flops"]) if row["flops"] else None,
        whole("saved_bytes"),
        whole("peak_bytes"),
        row["note"],
    )


def geometric_mean(values: Collection[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))
