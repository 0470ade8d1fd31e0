"""Faults, and a report of them that a person can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

KINDS = {
    "schema": "rows that are not what the others are",
    "empty": "fields with nothing in them",
    "truncated": "fields that lost their end",
    "encoding": "characters that were decoded wrongly",
    "duplicate": "rows that are there twice",
    "near-duplicate": "rows that are there twice but for a few words",
    "contradiction": "one prompt with different answers",
    "leakage": "held-out prompts that are trained on",
    "too-long": "examples longer than the model's context",
    "personal": "data about persons",
}
_SHOWN, _WIDTH = 5, 60  # findings of a kind, characters of data with each


class DataError(ValueError):
    """A file or an option that nothing can be checked with."""


@dataclass(frozen=True)
class Quote:
    """A text of the data, and the place in it that matters."""

    text: str
    at: int = 0

    def shown(self, mask: Callable[[str], str], width: int) -> str:
        """One line of about `width` characters. What `mask` hides is hidden before anything is cut: half an
        address would not be found."""
        text = mask(self.text)
        begin = max(0, min(self.at - width // 2, len(text) - width))
        end = begin + width
        line = "".join(map(_visible, " ".join(text[begin:end].split())))
        return f"“{'…' if begin else ''}{line}{'…' if end < len(text) else ''}”"


@dataclass(frozen=True)
class Finding:
    """A fault of a kind: where it is, what it is, and the data that shows it."""

    kind: str
    place: str
    what: str
    quotes: tuple[Quote, ...] = ()


@dataclass(frozen=True)
class Report:
    train: int
    held_out: int
    findings: list[Finding]
    allowed: frozenset[str]
    unchecked: dict[str, str]
    mask: Callable[[str], str]

    @property
    def failed(self) -> list[Finding]:
        """What was found and not allowed."""
        return [finding for finding in self.findings if finding.kind not in self.allowed]

    def __str__(self) -> str:
        lines = [f"{self.train:,} rows to train on, {self.held_out:,} held out"]
        for kind, about in KINDS.items():
            found = [finding for finding in self.findings if finding.kind == kind]
            if kind in self.unchecked:
                lines.append(f"  –     {kind:<15} {self.unchecked[kind]}")
            elif not found:
                lines.append(f"  ok    {kind:<15} no {about}")
            else:
                mark = "note " if kind in self.allowed else "FAULT"
                lines.append(f"  {mark} {kind:<15} {about}: {len(found):,}")
                lines += [f"          {self._line(finding)}" for finding in found[:_SHOWN]]
                if len(found) > _SHOWN:
                    lines.append(f"          and {len(found) - _SHOWN:,} more")
        return "\n".join(lines)

    def _line(self, finding: Finding) -> str:
        quotes = [quote.shown(self.mask, _WIDTH // len(finding.quotes)) for quote in finding.quotes]
        return f"{finding.place}: {finding.what}" + (f": {' and '.join(quotes)}" if quotes else "")


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
