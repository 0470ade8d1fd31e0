"""What the study found, kept as JSON lines in the order in which it came, so that it can stop and go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Frozen:
    """How well the model does a job without an adapter."""

    job: str
    loss: float
    figures: dict[str, float]
    kind: ClassVar[str] = "frozen"
    identity: ClassVar[tuple[str, ...]] = ("job",)


@dataclass(frozen=True)
class Pilot:
    """A run that chooses a learning rate: the loss on a part of the training examples that it left out."""

    job: str
    targets: str
    lr: float
    loss: float
    kind: ClassVar[str] = "pilot"
    identity: ClassVar[tuple[str, ...]] = ("job", "targets", "lr")


@dataclass(frozen=True)
class Tuned:
    """How well the model does a job on what was held out, tuned on one set of targets with one seed."""

    job: str
    targets: str
    seed: int
    lr: float
    loss: float
    figures: dict[str, float]
    seconds: float
    kind: ClassVar[str] = "tuned"
    identity: ClassVar[tuple[str, ...]] = ("job", "targets", "seed")


@dataclass(frozen=True)
class Cost:
    """A training step: seconds round by round and the bytes of tensors at its peak, by side."""

    targets: str
    trained: int
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]
    kind: ClassVar[str] = "cost"
    identity: ClassVar[tuple[str, ...]] = ("targets",)


Row = Frozen | Pilot | Tuned | Cost
_KINDS: dict[str, type[Row]] = {row.kind: row for row in (Frozen, Pilot, Tuned, Cost)}


@dataclass
class Store:
    """The rows of a study; `settings` say with what they were made, and rows of other settings do not mix."""

    path: Path
    settings: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)

    @staticmethod
    def open(path: Path, settings: Mapping[str, Any], *, anew: bool = False) -> Store:
        """Goes on with the file if there is one; `anew` puts that one aside.

        Raises ValueError where the file was made with other settings, or is no file of a study.
        """
        store = Store(path, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        if anew and path.exists():
            path.replace(path.with_name(f"previous-{path.name}"))
        if not path.exists():
            path.write_text(json.dumps(dict(settings)) + "\n", encoding="utf-8")
            return store
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # an interruption may have cut the last line
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        first, *lines = whole.splitlines() or [""]
        store._compare(first)
        store.rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=2)]
        return store

    def _compare(self, first: str) -> None:
        try:
            made_with = dict(json.loads(first))
        except (ValueError, TypeError):
            raise ValueError(f"{self.path}: its first line does not say with what it was made") from None
        wanted = json.loads(json.dumps(dict(self.settings)))  # as it reads when it comes out of a file
        for name in {**wanted, **made_with}:
            if made_with.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.path}: was made with {name} = {made_with.get(name)!r}, and this run has "
                    f"{wanted.get(name)!r}; --anew begins another"
                )

    def add(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": row.kind, **asdict(row)}) + "\n")
        self.rows.append(row)

    def has(self, kind: type[Row], **identity: Any) -> bool:
        return any(
            isinstance(row, kind) and all(getattr(row, name) == identity[name] for name in kind.identity)
            for row in self.rows
        )

    def frozen(self) -> dict[str, Frozen]:
        return {row.job: row for row in self.rows if isinstance(row, Frozen)}

    def pilots(self) -> list[Pilot]:
        return [row for row in self.rows if isinstance(row, Pilot)]

    def tuned(self) -> list[Tuned]:
        return [row for row in self.rows if isinstance(row, Tuned)]

    def costs(self) -> dict[str, Cost]:
        return {row.targets: row for row in self.rows if isinstance(row, Cost)}


def _row(line: str, where: str) -> Row:
    try:
        fields = dict(json.loads(line))
        return _KINDS[fields.pop("kind")](**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: not a row of a study: {error}") from error
