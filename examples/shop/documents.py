"""Supplier documents and what they truly say: generated from a seed, with mess of known kinds.

A document is an order confirmation with one to three lines. What varies is how it is written down: one of
four layouts, the style of dates and of money, the words of its labels, sums that are not asked for, remarks,
and spoilt letters in words. Numbers and codes are never spoilt: every document has one true reading.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.product_copy.data import Example

TRAIN, HELD_OUT = 320, 32
SUPPLIERS = (
    "Kelp & Sons",
    "Northing Ironworks",
    "Marram Textiles Ltd",
    "The Osier Yard",
    "Blackhouse Pottery",
    "J. Fenwick Ropes",
    "Sallow Lane Joinery",
    "Guillemot Glass Co",
    "Thrift & Campion",
    "Peewit Leather",
    "Estuary Chandlers",
    "Old Lime Works",
)
GOODS = (
    "enamel pan",
    "beech rolling pin",
    "wool blanket",
    "log basket",
    "stoneware jug",
    "mooring line",
    "pen tray",
    "water glass",
    "bath soap",
    "bridle collar",
    "storm lantern",
    "linen napkin",
    "fire poker",
    "bird feeder",
    "boat mobile",
)
SPOILT_WORD, REMARK, OTHER_SUMS = 0.08, 0.5, 0.5  # chances
_CONFUSED = {"l": "1", "o": "0", "e": "c", "i": "l", "m": "rn", "S": "5", "B": "8"}
_REMARKS = (
    "Please quote our reference when you write.",
    "Goods remain ours until paid for.",
    "The driver asks that somebody be in after nine.",
    "Short by one last time; made good with this lot.",
    "Pallets to be returned.",
    "New telephone number on the letterhead.",
    "Sorry for the delay, the kiln was down.",
)


@dataclass(frozen=True)
class Line:
    code: str
    goods: str
    quantity: int
    pence: int  # for one


@dataclass(frozen=True)
class Order:
    supplier: str
    number: str
    date: datetime.date
    lines: tuple[Line, ...]

    @property
    def pence(self) -> int:
        return sum(line.quantity * line.pence for line in self.lines)

    def truth(self) -> str:
        """The JSON that the document is to become: dates as ISO 8601, money in pounds."""
        items = [{"code": x.code, "quantity": x.quantity, "price": x.pence / 100} for x in self.lines]
        fields = {
            "supplier": self.supplier,
            "number": self.number,
            "date": self.date.isoformat(),
            "items": items,
            "total": self.pence / 100,
        }
        return json.dumps(fields, ensure_ascii=False)


def examples(seed: int = 0) -> list[Example]:
    """The training documents, then the held-out ones. No order number is in both."""
    chance = random.Random(seed)
    numbers = chance.sample(range(10_000, 99_999), TRAIN + HELD_OUT)
    made = []
    for index, number in enumerate(numbers):
        order = _order(chance, number)
        made.append(
            Example(
                title=order.number,
                prompt=prompt(_written(order, chance)),
                completion=order.truth(),
                heldout=index >= TRAIN,
                line=index + 1,
            )
        )
    return made


def prompt(document: str) -> str:
    return f"Read this document from a supplier and answer in JSON.\n\n{document}"


def score(answers: Sequence[str], asked: Sequence[Example]) -> dict[str, float]:
    """The shares of answers that are a JSON object, of fields that are exactly right, and of documents with
    all their fields right. A field is the supplier, the number, the date, the total, or one item."""
    valid, right, fields, whole = 0, 0, 0, 0
    for answer, example in zip(answers, asked, strict=True):
        try:
            said = json.loads(answer)
        except ValueError:
            said = None
        valid += isinstance(said, dict)
        true_fields = _fields(json.loads(example.completion))
        said_fields = _fields(said) if isinstance(said, dict) else {}
        same = sum(key in said_fields and said_fields[key] == value for key, value in true_fields.items())
        right += same
        fields += len(true_fields)
        whole += same == len(true_fields) == len(said_fields)
    return {
        "valid JSON": valid / len(answers),
        "exact fields": right / fields,
        "exact documents": whole / len(answers),
    }


def _fields(said: dict[str, Any]) -> dict[str, Any]:
    items = said.get("items")
    found = {key: value for key, value in said.items() if key != "items"}
    if isinstance(items, list):
        found.update((f"items[{index}]", item) for index, item in enumerate(items))
    return found


def _order(chance: random.Random, number: int) -> Order:
    lines = []
    for goods in chance.sample(GOODS, chance.choice((1, 1, 2, 2, 3))):
        letters = "".join(word[0] for word in goods.split()).upper()
        lines.append(
            Line(
                code=f"{letters}-{chance.randrange(100, 1000)}",
                goods=goods,
                quantity=chance.choice((1, 2, 4, 6, 10, 12, 20, 24, 36, 50)),
                pence=chance.randrange(4, 160) * 25,
            )
        )
    day = datetime.date(2026, 1, 1) + datetime.timedelta(days=chance.randrange(365))
    prefix = chance.choice(("", "", "SO", "INV-", "K/"))
    return Order(chance.choice(SUPPLIERS), f"{prefix}{number}", day, tuple(lines))


# How an order is written down


def _written(order: Order, chance: random.Random) -> str:
    layout = chance.choice((_as_table, _as_list, _as_letter, _as_forwarded))
    text = layout(order, chance, chance.choice(_DATES)(order.date), chance.choice(_MONEY))
    if chance.random() < REMARK:
        text += "\n" + chance.choice(_REMARKS)
    return "\n".join(" ".join(_spoilt(w, chance) for w in line.split(" ")) for line in text.splitlines())


_DATES: tuple[Callable[[datetime.date], str], ...] = (
    lambda d: d.isoformat(),
    lambda d: f"{d:%d/%m/%Y}",
    lambda d: f"{d.day} {d:%B %Y}",
    lambda d: f"{d:%a} {d.day} {d:%b} {d:%y}",
    lambda d: f"{d.day}.{d.month}.{d:%Y}",
)
Money = Callable[[int], str]
_MONEY: tuple[Money, ...] = (
    lambda pence: f"£{pence / 100:,.2f}",
    lambda pence: f"{pence / 100:.2f}",
    lambda pence: f"GBP {pence / 100:.2f}",
    lambda pence: f"£{pence // 100}" if pence % 100 == 0 else f"£{pence / 100:.2f}",
)


def _sums(order: Order, chance: random.Random, money: Money) -> list[str]:
    """The total, and around it sums that nobody asked for."""
    total = f"{chance.choice(('Total', 'TOTAL', 'Amount due', 'Goods total'))}: {money(order.pence)}"
    if chance.random() >= OTHER_SUMS:
        return [total]
    return [total, f"VAT reg. 412 7730 {chance.randrange(10, 99)}", "Terms: 30 days net"]


def _as_table(order: Order, chance: random.Random, date: str, money: Money) -> str:
    head = [
        order.supplier.upper(),
        f"{chance.choice(('Order no.', 'Our ref', 'No'))} {order.number}   {date}",
        "code | item | qty | each",
    ]
    rows = [f"{x.code} | {x.goods} | {x.quantity} | {money(x.pence)}" for x in order.lines]
    return "\n".join([*head, *rows, *_sums(order, chance, money)])


def _as_list(order: Order, chance: random.Random, date: str, money: Money) -> str:
    at = chance.choice(("@", "at", "x"))
    rows = [f"- {x.quantity} {x.goods} ({x.code}) {at} {money(x.pence)}" for x in order.lines]
    head = [f"From: {order.supplier}", f"Date: {date}", f"Order confirmation {order.number}"]
    return "\n".join([*head, *rows, *_sums(order, chance, money)])


def _as_letter(order: Order, chance: random.Random, date: str, money: Money) -> str:
    rows = [f"{x.quantity} of the {x.goods}, {x.code}, at {money(x.pence)} each" for x in order.lines]
    greeting = chance.choice(("Dear both,", "Hello,", "To Tern & Tallow"))
    return (
        f"{greeting}\nthank you for your order. Under {order.number} we send, on {date}: {'; '.join(rows)}. "
        f"That makes {money(order.pence)}.\nYours, {order.supplier}"
    )


def _as_forwarded(order: Order, chance: random.Random, date: str, money: Money) -> str:
    rows = [f"> {x.code} {x.goods} qty {x.quantity} price {money(x.pence)}" for x in order.lines]
    subject = chance.choice(("Fwd: order", "FW: your order", "Re: Re: order"))
    sums = [f"> {line}" for line in _sums(order, chance, money)]
    return "\n".join([f"{subject} {order.number}", f"> {order.supplier}, {date}", *rows, *sums])


def _spoilt(word: str, chance: random.Random) -> str:
    """A word as a bad scan has it, now and then. Those with a digit or a capital are facts, and spared."""
    plain = word.isalpha() and word.islower() and len(word) > 3
    if not plain or chance.random() >= SPOILT_WORD:
        return word
    letters = [index for index, letter in enumerate(word) if letter in _CONFUSED]
    if not letters:
        return word
    at = chance.choice(letters)
    return word[:at] + _CONFUSED[word[at]] + word[at + 1 :]
