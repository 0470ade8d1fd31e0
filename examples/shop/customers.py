"""Customers' histories and who left: generated from a stated process, with noise.

A year in months. A customer orders in a month with a chance of their own; an order may come late or broken,
and some of those who suffer it write, and are answered or not. Whether they leave is drawn from

    P(left) = σ(−1.7 + 0.35·months since the last order + 0.6·orders late + 0.5·orders broken
                + 1.5·complaints unanswered − 0.3·letters read + ε),        ε ~ N(0, 0.6²)

So the truth is noisy: nobody can reach an AUC of 1, and the score without ε is the most there is to reach.
"""

from __future__ import annotations

import calendar
import datetime
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.product_copy.data import Example
from examples.product_copy.errors import DemoError

TRAIN, HELD_OUT = 400, 200
MONTHS = calendar.month_name[1:]
_KINDS = ("kitchen", "garden", "boat shed", "desk", "bath", "hearth", "bedroom")
_NOISE = 0.6
STAYED, LEFT = "no", "yes"


@dataclass(frozen=True)
class Customer:
    """What the shop knows of a year, and what became of it."""

    events: tuple[str, ...]
    earlier: int  # orders before this year
    orders: int
    pounds: int
    late: int
    broken: int
    unanswered: int
    read: int  # letters, of four
    since: int  # months since the last order; 12 without one
    left: bool

    @property
    def tendency(self) -> float:
        """The process's own score, without its noise."""
        return (
            -1.7
            + 0.35 * self.since
            + 0.6 * self.late
            + 0.5 * self.broken
            + 1.5 * self.unanswered
            - 0.3 * self.read
        )

    @property
    def features(self) -> tuple[float, ...]:
        """The history in numbers, for a regression."""
        numbers = (self.earlier, self.orders, self.pounds, self.late, self.broken, self.unanswered)
        return tuple(float(number) for number in (*numbers, self.read, self.since))

    @property
    def story(self) -> str:
        return "\n".join(self.events)


def customers(seed: int = 0) -> list[Customer]:
    """The training customers, then the held-out ones."""
    chance = random.Random(seed)
    return [_customer(chance) for _ in range(TRAIN + HELD_OUT)]


def prompt(story: str) -> str:
    return f"A customer's year with the shop:\n\n{story}\n\nHas this customer left? Answer yes or no."


def examples() -> list[Example]:
    return [
        Example(
            title=f"customer {index + 1}",
            prompt=prompt(person.story),
            completion=LEFT if person.left else STAYED,
            heldout=index >= TRAIN,
            line=index + 1,
        )
        for index, person in enumerate(customers())
    ]


def reference_figures() -> dict[str, float]:
    """On the held-out customers, without a language model: a logistic regression on the same histories in
    numbers, and the process itself, whose noise nobody can know."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    people = customers()
    known, unseen = people[:TRAIN], people[TRAIN:]
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit([p.features for p in known], [p.left for p in known])
    left = [person.left for person in unseen]
    return {
        "AUC of a logistic regression": auc(left, model.predict_proba([p.features for p in unseen])[:, 1]),
        "AUC of the process without its noise": auc(left, [person.tendency for person in unseen]),
    }


def auc(left: Sequence[bool], scores: Sequence[float]) -> float:
    """The chance that one who left scores higher than one who stayed."""
    from sklearn.metrics import roc_auc_score

    if len(set(left)) < 2:
        raise DemoError(f"the {len(left)} held-out customers all ended alike, and an AUC needs both kinds")
    return float(roc_auc_score(left, scores))


def _customer(chance: random.Random) -> Customer:
    often = chance.betavariate(1.2, 3.0)  # the chance of an order in a month
    reads = chance.random()
    orders = pounds = late = broken = unanswered = read = 0
    since = 12
    joined = datetime.date(2018, 1, 1) + datetime.timedelta(days=chance.randrange(8 * 365))
    earlier = 1 + round(often * (2026 - joined.year) * 12 * chance.uniform(0.7, 1.3))
    events = [f"Customer since {joined.day} {joined:%B %Y}, {earlier} orders before this year."]
    for index, month in enumerate(MONTHS):
        if chance.random() < often:
            orders += 1
            since = 11 - index
            cost = round(chance.lognormvariate(3.6, 0.5))
            pounds += cost
            event = f"{month}: ordered for £{cost} ({chance.choice(_KINDS)})"
            trouble = ""
            if chance.random() < 0.2:
                late += 1
                trouble = "it came late"
            elif chance.random() < 0.12:
                broken += 1
                trouble = "it came broken"
            if trouble:
                event += f"; {trouble}"
                if chance.random() < 0.6:
                    if chance.random() < 0.5:
                        unanswered += 1
                        event += "; wrote to complain, no answer"
                    else:
                        event += "; wrote to complain, was answered"
            events.append(event + ".")
        if index % 3 == 2 and chance.random() < reads:
            read += 1
            events.append(f"{month}: read the letter.")
    if since == 12:
        events.append("No order this year.")
    counts = earlier, orders, pounds, late, broken, unanswered, read, since
    person = Customer(tuple(events), *counts, left=False)
    score = person.tendency + chance.gauss(0, _NOISE)
    return replace(person, left=chance.random() < 1 / (1 + math.exp(-score)))
