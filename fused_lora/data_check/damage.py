"""Rows that are damaged by themselves: empty, cut off, or decoded wrongly."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from fused_lora.data_check.report import Finding, Quote
from fused_lora.data_check.rows import Row

_NOTHING = frozenset({"", "null", "nan", "n/a", "#n/a", "undefined", "todo", "tbd"})
# A habit is what at least this share of at least so many rows do.
_HABIT, _ENOUGH = 0.9, 20
_BESIDE = 20  # lengths that a pile is held against
_SENTENCE_END = re.compile(r"""[.!?:;。！？)\]}"'”’`*_>]$""")


def fields(row: Row) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("prompt", row.prompt), ("completion", row.completion)


def empty(rows: Sequence[Row]) -> Iterator[Finding]:
    unprompted = not any(row.prompt for row in rows)  # text to learn and nothing else
    for row in rows:
        for name, text in fields(row):
            if _says_nothing(text) and not (unprompted and name == "prompt"):
                quotes = (Quote(text.strip()),) if text.strip() else ()
                yield Finding("empty", row.place, f"the {name} says nothing", quotes)


def _says_nothing(text: str) -> bool:
    return text.strip().casefold() in _NOTHING


def truncated(rows: Sequence[Row]) -> Iterator[Finding]:
    yield from _cut_at_one_length(rows)
    told = [row for row in rows if not _says_nothing(row.completion)]
    structured = [row for row in told if row.completion.lstrip().startswith(("{", "["))]
    prose = [row for row in told if not row.completion.lstrip().startswith(("{", "["))]
    for some, is_whole, what in (
        (prose, _ends_a_sentence, "stops in mid-sentence"),
        (structured, _is_json, "is no whole JSON"),
    ):
        cut = [row for row in some if not is_whole(row.completion)]
        if len(some) >= _ENOUGH and len(cut) <= (1 - _HABIT) * len(some):
            for row in cut:
                quote = Quote(row.completion, len(row.completion))
                yield Finding("truncated", row.place, f"the completion {what}", (quote,))


def _ends_a_sentence(text: str) -> bool:
    text = text.rstrip()
    return bool(_SENTENCE_END.search(text)) and not text.endswith(("...", "…"))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _cut_at_one_length(rows: Sequence[Row]) -> Iterator[Finding]:
    """A column that could hold so many characters and no more: texts pile up at just that length, none is
    longer, and they stop in mid-sentence."""
    for index, name in enumerate(("prompt", "completion")):
        counts = Counter(len(fields(row)[index][1]) for row in rows)
        longest = max(counts)
        next_best = max(counts[length] for length in range(longest - _BESIDE, longest))
        if longest < 2 * _BESIDE or counts[longest] < 3 * max(1, next_best):
            continue
        for row in rows:
            text = fields(row)[index][1]
            if len(text) == longest and not _ends_a_sentence(text):
                what = f"the {name} is cut at {longest} characters, as {counts[longest]} are"
                yield Finding("truncated", row.place, what, (Quote(text, len(text)),))


_LOST = re.compile("\ufffd")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{4}")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-fA-F]{1,6}|[a-zA-Z]{2,8}\d?);")


def encoding(rows: Sequence[Row]) -> Iterator[Finding]:
    """One finding for a field at most: the first of its kinds of damage."""
    for row in rows:
        for name, text in fields(row):
            damage = _damage(text)
            if damage:
                what, *quotes = damage
                yield Finding("encoding", row.place, f"the {name} holds {what}", tuple(quotes))


def _damage(text: str) -> tuple[str, Quote] | tuple[str, Quote, Quote] | None:
    """What is wrong, where, and in the last case how it reads when that is undone."""
    from ftfy import fix_encoding
    from ftfy.badness import BADNESS_RE

    for pattern, what in (
        (_LOST, "a replacement character, where a letter was lost"),
        (_SURROGATE, "half of a character outside the basic plane"),
        (_CONTROL, "a control character"),
        (_ESCAPE, "an escape that was escaped again"),
    ):
        match = pattern.search(text)
        if match:
            return what, Quote(text, match.start())
    match = _ENTITY.search(text)
    if match and html.unescape(match[0]) != match[0]:
        return f"the HTML entity {match[0]}", Quote(text, match.start())
    if BADNESS_RE.search(text) and (fixed := fix_encoding(text)) != text:
        at = next((i for i, (a, b) in enumerate(zip(text, fixed, strict=False)) if a != b), len(fixed))
        return "text decoded wrongly; it, and what it was", Quote(text, at), Quote(fixed, at)
    return None
