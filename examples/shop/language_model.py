"""A causal language model and its tokenizer, as the jobs use them: loss, answers, preferences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.product_copy import data, measure
from examples.product_copy.data import Encoded, Example
from examples.product_copy.model import load_model, load_tokenizer

_BATCH = 32


@dataclass
class LanguageModel:
    model: Any
    tokenizer: Any
    source: Path
    max_length: int = 512

    @classmethod
    def load(cls, directory: Path) -> LanguageModel:
        return cls(load_model(directory), load_tokenizer(directory), directory)

    @property
    def pad_id(self) -> int:
        pad: int | None = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id) if pad is None else pad

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        return data.encode(examples, self.tokenizer, self.max_length, self.source)

    def loss(self, examples: Sequence[Example]) -> float:
        """The mean over all tokens of the completions."""
        encoded = self.encode(examples)
        batches = [
            data.collate([encoded[index] for index in group], self.pad_id)
            for group in _alike(encoded, "held-out loss")
        ]
        return measure.heldout_loss(self.model, batches)

    def write(self, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        """The greedy answer to each prompt."""
        encoded = self.encode(examples)
        answers = [""] * len(encoded)
        for group in _alike(encoded, "writing answers"):
            batch = [encoded[index] for index in group]
            texts = measure.write(self.model, self.tokenizer, batch, max_new_tokens, self.pad_id)
            for index, text in zip(group, texts, strict=True):
                answers[index] = text
        return answers

    @torch.no_grad()
    def preference(self, examples: Sequence[Example], this: str, that: str) -> list[float]:
        """For each prompt the log of how many times likelier an answer begins as `this` than as `that`."""
        begins = []
        for text in (this, that):
            (item,) = self.encode([replace(examples[0], completion=text)])
            begins.append(item.ids[item.prompt])
        encoded = self.encode(examples)
        preferences = [0.0] * len(encoded)
        self.model.eval()
        for group in _alike(encoded, "weighing answers"):
            batch = data.collate([encoded[index] for index in group], self.pad_id)
            logits = self.model(**batch.inputs(), use_cache=False).logits
            for row, index in enumerate(group):
                # The last token of the prompt is where the answer's first is predicted.
                yes, no = logits[row, encoded[index].prompt - 1, begins].float().tolist()
                preferences[index] = yes - no
        return preferences


def _alike(encoded: Sequence[Encoded], doing: str) -> Iterator[list[int]]:
    """The items' numbers in groups of neighbours in length, so that little is computed on padding."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
    groups = [order[begin : begin + _BATCH] for begin in range(0, len(order), _BATCH)]
    yield from tqdm(groups, desc=doing, unit="batch", leave=False, disable=len(groups) == 1)
