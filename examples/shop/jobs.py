"""The four jobs: their examples, how they are tuned, and what is measured on what was held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from examples.product_copy import data
from examples.product_copy.data import Example
from examples.shop import customers, documents, support


class Writer(Protocol):
    """A language model, as the measurements need it."""

    def write(self, examples: Sequence[Example], max_new_tokens: int) -> list[str]: ...

    def preference(self, examples: Sequence[Example], this: str, that: str) -> list[float]: ...


@dataclass(frozen=True)
class Job:
    """`prompt` asks for the job on a text. `measure` gives figures by name, each a share or an AUC: more is
    better. `beside` are figures to see those by, which no language model made."""

    name: str
    about: str
    prompt: Callable[[str], str]
    examples: Callable[[], list[Example]]
    steps: int
    batch_size: int
    lr: float = 5e-3
    longest: int = 120  # answer, in tokens
    measure: Callable[[Writer, Sequence[Example]], dict[str, float]] = lambda writer, unseen: {}
    beside: Callable[[], dict[str, float]] = dict


_REPLY, _DOCUMENT, _WORD = 60, 160, 4  # tokens


def _catalogue() -> list[Example]:
    return data.read(data.CATALOGUE)


def _support(writer: Writer, unseen: Sequence[Example]) -> dict[str, float]:
    return support.score(writer.write(unseen, _REPLY), unseen)


def _documents(writer: Writer, unseen: Sequence[Example]) -> dict[str, float]:
    return documents.score(writer.write(unseen, _DOCUMENT), unseen)


def _churn(writer: Writer, unseen: Sequence[Example]) -> dict[str, float]:
    scores = writer.preference(unseen, customers.LEFT, customers.STAYED)
    return {"AUC": customers.auc([example.completion == customers.LEFT for example in unseen], scores)}


JOBS = {
    job.name: job
    for job in (
        Job(
            name="copy",
            about="product copy from attributes",
            prompt=data.product_prompt,
            examples=_catalogue,
            steps=80,
            batch_size=4,
        ),
        Job(
            name="support",
            about="answers to customers",
            prompt=support.prompt,
            examples=support.examples,
            steps=80,
            batch_size=4,
            longest=_REPLY,
            measure=_support,
        ),
        Job(
            name="documents",
            about="supplier documents to JSON",
            prompt=documents.prompt,
            examples=documents.examples,
            steps=60,
            batch_size=4,
            longest=_DOCUMENT,
            measure=_documents,
        ),
        Job(
            name="churn",
            about="which customers leave",
            prompt=customers.prompt,
            examples=customers.examples,
            steps=60,
            batch_size=8,
            lr=1e-3,  # at 5e-3 it was no better than a guess after 35 steps
            longest=_WORD,
            measure=_churn,
            beside=customers.reference_figures,
        ),
    )
}
