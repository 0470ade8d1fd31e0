"""Data about persons that a model would learn by heart, found and masked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence

from fused_lora.data_check.damage import fields
from fused_lora.data_check.report import DataError, Finding, Quote
from fused_lora.data_check.rows import Row

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+")
# With which digits cards begin, and in which groups their numbers are written, if not in one.
_CARDS = (
    (("34", "37"), r"\d{15}|\d{4}([ -])\d{6}\2\d{5}"),
    (("2", "4", "5", "6"), r"\d{16}|\d{4}([ -])\d{4}(?:\2\d{4}){2}"),
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
_DIGITS = re.compile(r"\d(?:[\s().\-/–]{0,3}\d){6}")  # with fewer there is no number to call
_INTEGER_PART = re.compile(r"\d[.,]$")

_DOT = "•"

Span = tuple[int, int]


class Privacy:
    """`region` says how telephone numbers are written at home; `public` are texts that may stand."""

    def __init__(self, region: str | None = None, public: Collection[str] = ()) -> None:
        import phonenumbers

        if region is not None and region not in phonenumbers.SUPPORTED_REGIONS:
            raise DataError(f"region: must be a country's two letters, as GB, got {region!r}")
        self._region = region
        self._searches: tuple[tuple[str, Callable[[str], list[Span]]], ...] = (
            ("an e-mail address", _emails),
            ("an account number (IBAN)", _ibans),
            ("a card number", _cards),
            ("a telephone number", self._telephones),
        )
        # Where numbers begin with 0 at home, those that do not are of other things.
        metadata = phonenumbers.PhoneMetadata.metadata_for_region(region) if region else None
        self._trunk = "0" if metadata and metadata.national_prefix == "0" else ""
        self._public = frozenset(_bare(text) for text in public)

    def personal(self, rows: Sequence[Row]) -> Iterator[Finding]:
        for row in rows:
            for name, text in fields(row):
                for what, (begin, end) in self._spans(text):
                    quote = Quote(text, (begin + end) // 2)
                    yield Finding("personal", row.place, f"the {name} holds {what}", (quote,))

    def mask(self, text: str) -> str:
        """The text with a dot for each letter and digit of what is personal in it, but for the first."""
        for _, (begin, end) in self._spans(text):
            text = text[: begin + 1] + re.sub(r"\w", _DOT, text[begin + 1 : end]) + text[end:]
        return text

    def _spans(self, text: str) -> list[tuple[str, Span]]:
        """What is personal, by what it is. A search does not see what one before it found."""
        found: list[tuple[str, Span]] = []
        rest = text
        for what, search in self._searches:
            for begin, end in search(rest):
                found.append((what, (begin, end)))
                rest = rest[:begin] + _DOT * (end - begin) + rest[end:]
        return [(what, span) for what, span in found if _bare(text[slice(*span)]) not in self._public]

    def _telephones(self, text: str) -> list[Span]:
        if not _DIGITS.search(text):
            return []
        import phonenumbers

        def is_one(match: phonenumbers.PhoneNumberMatch) -> bool:
            decimals = _INTEGER_PART.search(text[max(0, match.start - 2) : match.start])
            return not decimals and (match.raw_string[0] in "+(" or match.raw_string.startswith(self._trunk))

        matches = phonenumbers.PhoneNumberMatcher(text, self._region)
        return [(match.start, match.end) for match in matches if is_one(match)]


def _emails(text: str) -> list[Span]:
    return [match.span() for match in _EMAIL.finditer(text)] if "@" in text else []


def _cards(text: str) -> list[Span]:
    from stdnum import luhn

    def is_card(shown: str, begins: tuple[str, ...]) -> bool:
        digits = re.sub(r"\D", "", shown)
        return digits.startswith(begins) and luhn.is_valid(digits)

    return [
        match.span(1)
        for begins, groups in _CARDS
        # Looked ahead for: groups that are no card may hold the first of one that is.
        for match in re.finditer(rf"(?<![\w+])(?<!\d[.,])(?=({groups})(?!\w|[.,]\d))", text)
        if is_card(match[1], begins)
    ]


def _ibans(text: str) -> list[Span]:
    from stdnum import iban

    spans = []
    for match in _IBAN.finditer(text):
        # A word in capitals after it may look like more of it.
        for end in range(match.end(), match.start() + 14, -1):
            if iban.is_valid(text[match.start() : end]):
                spans.append((match.start(), end))
                break
    return spans


def _bare(text: str) -> str:
    return re.sub(r"\s", "", text).casefold()
