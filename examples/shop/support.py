"""Customers' questions and the shop's answers, each resting on one of its policies.

A question comes with a subject, as from a contact form, and the subject's policy goes into the prompt: what
the shop promises may change tomorrow, and is not to be learnt by heart. Learnt is to answer by it, in the
shop's voice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.product_copy.data import Example
from examples.product_copy.errors import DemoError

_DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class Policy:
    """A rule of the shop's. An answer states it if it matches each of `states`, in either case of letters."""

    id: str
    title: str
    fact: str
    states: tuple[str, ...]

    def stated_in(self, answer: str) -> bool:
        return all(re.search(pattern, answer, re.IGNORECASE) for pattern in self.states)


@dataclass(frozen=True)
class Ticket:
    id: str
    policy: str
    question: str
    answer: str
    heldout: bool


def policies() -> dict[str, Policy]:
    return {
        row["id"]: Policy(row["id"], row["title"], row["fact"], tuple(row["states"]))
        for row in _rows("policies.jsonl")
    }


def tickets() -> list[Ticket]:
    return [
        Ticket(row["id"], row["policy"], row["question"], row["answer"], row["split"] == "heldout")
        for row in _rows("tickets.jsonl")
    ]


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_DATA / name).read_text(encoding="utf-8").splitlines()]


def prompt(text: str) -> str:
    """`text`: the subject, which is a policy's title, and on the lines below it the question."""
    subject, _, question = text.partition("\n")
    facts = {policy.title.casefold(): policy.fact for policy in policies().values()}
    if subject.strip().casefold() not in facts or not question.strip():
        raise DemoError(
            f"a question begins with a line that is one of the subjects {'; '.join(facts)}; got {text!r}"
        )
    fact = facts[subject.strip().casefold()]
    return f"Answer this customer of Tern & Tallow by our rule.\n\nRule: {fact}\nCustomer: {question.strip()}"


def examples() -> list[Example]:
    """Every policy is asked for by three tickets to train on and by one that is held out."""
    rules = policies()
    return [
        Example(
            title=ticket.id,
            prompt=prompt(f"{rules[ticket.policy].title}\n{ticket.question}"),
            completion=ticket.answer,
            heldout=ticket.heldout,
            line=number,
        )
        for number, ticket in enumerate(tickets(), start=1)
    ]


def score(answers: Sequence[str], asked: Sequence[Example]) -> dict[str, float]:
    """The share of answers that state the fact of the policy that their ticket is about."""
    rules = policies()
    about = {ticket.id: rules[ticket.policy] for ticket in tickets()}
    right = [about[example.title].stated_in(text) for text, example in zip(answers, asked, strict=True)]
    return {"answers that state the fact": sum(right) / len(right)}
