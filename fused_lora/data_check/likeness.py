"""Rows held against each other: the same, nearly the same, contradicting, in both sets."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fused_lora.data_check.report import Finding, Quote
from fused_lora.data_check.rows import Row

# Of the runs of _RUN words in two texts, the share that both have, from which on they are alike.
_ALIKE, _RUN = 0.8, 2
_PERMUTATIONS = 64
_CANDIDATES = 32  # looked at for a row, so that time stays in proportion to the rows
_SAMPLE, _FEW = 2000, 4  # rows that a template is seen in, and that are too few for one
# Where words are not set apart, as in Chinese and Japanese, a character is one.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")


def repeated(rows: Sequence[Row]) -> Iterator[Finding]:
    """Duplicates, contradictions and leakage that a comparison of normal forms finds."""
    whole: dict[tuple[bool, str, str], Row] = {}
    answers: dict[tuple[bool, str], tuple[str, Row]] = {}
    trained = {_normal(_key(row)): row for row in reversed(rows) if not row.held_out}
    for row in rows:
        prompt, completion = _normal(row.prompt), _normal(row.completion)
        first = whole.setdefault((row.held_out, prompt, completion), row)
        if first is not row:
            yield Finding("duplicate", row.place, f"the same as {first.place}", (Quote(_key(row)),))
        elif prompt:
            answer, other = answers.setdefault((row.held_out, prompt), (completion, row))
            if answer != completion:
                quotes = (Quote(row.prompt), Quote(row.completion), Quote(other.completion))
                yield Finding("contradiction", row.place, f"another answer than {other.place}", quotes)
        if row.held_out and (source := trained.get(prompt or completion)):
            what = f"its prompt is that of {source.place}"
            yield Finding("leakage", row.place, what, (Quote(_key(row)),))


def similar(rows: Sequence[Row]) -> Iterator[Finding]:
    """Near duplicates within each set, and held-out prompts that nearly are training prompts."""
    trained = [row for row in rows if not row.held_out]
    unseen = [row for row in rows if row.held_out]
    for some in (trained, unseen):
        texts = [f"{row.prompt}\n{row.completion}" for row in some]
        finder = _Finder(texts)
        for row, text in zip(some, map(finder.read, texts), strict=True):
            like = finder.find(text)
            finder.add(text, findable=not like)  # one of a family is enough to find the others by
            if like:
                number, share = like
                what = f"{share:.0%} the same as {some[number].place}"
                yield Finding("near-duplicate", row.place, what, (Quote(_key(row)),))
    finder = _Finder([_key(row) for row in rows])
    for row in trained if unseen else ():
        finder.add(finder.read(_key(row)))
    for row in unseen:
        if like := finder.find(finder.read(_key(row))):
            number, share = like
            what = f"its prompt is {share:.0%} the same as in {trained[number].place}"
            yield Finding("leakage", row.place, what, (Quote(_key(row)),))


@dataclass(frozen=True)
class _Text:
    normal: str
    runs: frozenset[str]
    signature: Any


class _Finder:
    """Finds a text that is nearly, and not quite, another one. What more than half of the texts have in
    common is their template, and makes no two of them alike."""

    def __init__(self, texts: Sequence[str]) -> None:
        from datasketch import MinHash, MinHashLSH

        self._unsigned = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        # It offers more than is alike; what it offers is compared exactly.
        self._offers = MinHashLSH(threshold=_ALIKE - 0.1, num_perm=_PERMUTATIONS)
        self._added: list[str] = []
        self._known: set[str] = set()
        sample = texts[:: max(1, len(texts) // _SAMPLE)]
        counts = Counter(run for text in sample for run in _runs(_normal(text)))
        self._template = {run for run, count in counts.items() if count > max(_FEW, len(sample) / 2)}

    def read(self, text: str) -> _Text:
        normal = _normal(text)
        runs = self._own_runs(normal)
        signature = self._unsigned.copy()
        signature.update_batch([run.encode("utf-8", "replace") for run in runs])
        return _Text(normal, frozenset(runs), signature)

    def add(self, text: _Text, findable: bool = True) -> None:
        """The texts are numbered as they come."""
        if findable and text.runs and text.normal not in self._known:
            self._offers.insert(len(self._added), text.signature, check_duplication=False)
        self._added.append(text.normal)
        self._known.add(text.normal)

    def find(self, text: _Text) -> tuple[int, float] | None:
        """The number of a text that is like this one, and how much; none for one that is there exactly."""
        if not text.runs or text.normal in self._known:
            return None
        best = 0, 0.0
        for number in sorted(self._offers.query(text.signature))[:_CANDIDATES]:
            others = self._own_runs(self._added[number])
            share = len(text.runs & others) / len(text.runs | others)
            best = max(best, (number, share), key=lambda pair: pair[1])
        return best if best[1] >= _ALIKE else None

    def _own_runs(self, normal: str) -> set[str]:
        return _runs(normal) - self._template


def _runs(normal: str) -> set[str]:
    words = _WORD.findall(normal)
    return {" ".join(words[i : i + _RUN]) for i in range(max(1, len(words) - _RUN + 1))} if words else set()


def _key(row: Row) -> str:
    return row.prompt or row.completion


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
