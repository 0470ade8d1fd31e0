"""Examples: read and checked from JSON lines, made into tokens, put into batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.product_copy.errors import DemoError

CATALOGUE = Path(__file__).with_name("catalogue.jsonl")
HOLD_OUT_EVERY = 6
IGNORED = -100  # the label that transformers' loss leaves out
_SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Example:
    """What the model is asked, and the answer it should give."""

    title: str
    prompt: str
    completion: str
    heldout: bool
    line: int


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: the first `prompt` of `ids` are given, the rest is to be learnt."""

    ids: tuple[int, ...]
    prompt: int
    cut: bool = False

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.ids[: self.prompt]


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def read(path: Path) -> list[Example]:
    """The examples of a JSON-lines file: products with attributes and copy, or prompts and completions.

    Without any "split", every sixth example is held out. Raises DemoError with the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DemoError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    rows: list[tuple[int, dict[str, Any]]] = []
    # Not splitlines(), which also breaks at characters that may stand within JSON's strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append((number, _parse(line, f"{path}, line {number}")))
    split_given = any("split" in row for _, row in rows)
    examples: list[Example] = []
    seen: dict[str, int] = {}
    for number, row in rows:
        where = f"{path}, line {number}"
        title, prompt, completion = _pair(row, number, where) if _is_pair(row) else _product(row, where)
        sixth = (len(examples) + 1) % HOLD_OUT_EVERY == 0
        heldout = _split(row, where) if split_given else sixth
        example = Example(title, prompt, completion, heldout, number)
        key = row.get("id", example.prompt)
        if seen.setdefault(key, number) != number:
            kind = "id" if "id" in row else "prompt"
            raise DemoError(f"{where}: {kind} {_short(key)} is on line {seen[key]} already")
        examples.append(example)
    for split, heldout in (("train", False), ("heldout", True)):
        if not any(example.heldout == heldout for example in examples):
            hint = "" if split_given else f' (without "split" keys every {HOLD_OUT_EVERY}th line is held out)'
            raise DemoError(f"{path}: no line has split {split!r}, and both splits are needed{hint}")
    return examples


def sample() -> list[Example]:
    """The catalogue's first 84 products, of which 14 are held out: few enough for a run of minutes."""
    return read(CATALOGUE)[:84]


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DemoError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DemoError(f"{where}: must be an object, got {_short(row)}")
    return row


def _is_pair(row: dict[str, Any]) -> bool:
    return "prompt" in row or "completion" in row


def _pair(row: dict[str, Any], line: int, where: str) -> tuple[str, str, str]:
    prompt, completion = (_text(row, key, where) for key in ("prompt", "completion"))
    title = row["id"] if isinstance(row.get("id"), str) else f"line {line}"
    return title, prompt, completion


def _product(row: dict[str, Any], where: str) -> tuple[str, str, str]:
    missing = [key for key in ("id", "name", "category", "attributes", "copy") if key not in row]
    if missing:
        raise DemoError(
            f"{where}: lacks {', '.join(map(repr, missing))}; a product has id, name, category, attributes "
            'and copy (or give "prompt" and "completion")'
        )
    name, category, copy = (_text(row, key, where) for key in ("name", "category", "copy"))
    _text(row, "id", where)
    attributes = row["attributes"]
    if not isinstance(attributes, dict) or not attributes:
        raise DemoError(f"{where}: 'attributes' must be an object with entries, got {_short(attributes)}")
    facts = {"name": name, "category": category}
    facts.update((key, _text(attributes, key, f"{where}, attributes")) for key in attributes)
    listed = "\n".join(f"{key}: {value}" for key, value in facts.items())
    return name, product_prompt(listed), copy


def product_prompt(facts: str) -> str:
    """facts: a line each, as "material: beech"."""
    return f"Write the shop's copy for this product.\n\n{facts}"


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise DemoError(f"{where}: lacks {key!r}")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise DemoError(f"{where}: {key!r} must be text that is not empty, got {_short(value)}")
    return value


def _split(row: dict[str, Any], where: str) -> bool:
    if "split" not in row:
        raise DemoError(f"{where}: lacks 'split', which other lines have")
    if row["split"] not in _SPLITS:
        raise DemoError(f"{where}: 'split' must be 'train' or 'heldout', got {_short(row['split'])}")
    return bool(row["split"] == "heldout")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int, source: Path) -> list[Encoded]:
    """Every example in the tokenizer's chat format: the prompt is the user's turn, the completion the
    assistant's, with the token that ends it. What is longer than max_length loses its end."""
    return [_encode(example, tokenizer, max_length, source) for example in examples]


def _encode(example: Example, tokenizer: Any, max_length: int, source: Path) -> Encoded:
    chat = [{"role": "user", "content": example.prompt}]
    question: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # The answer is what the template makes of it, up to the end of the turn. A template that rewrites
    # the question once it is answered cannot be split so; there the answer stands alone.
    chat.append({"role": "assistant", "content": example.completion})
    whole: str = tokenizer.apply_chat_template(chat, tokenize=False)
    answer = whole[len(question) :].rstrip() if whole.startswith(question) else example.completion
    if not answer.endswith(tokenizer.eos_token):
        answer += tokenizer.eos_token
    prompt, completion = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer)
    )
    if len(prompt) >= max_length:
        raise DemoError(
            f"{source}, line {example.line}: its prompt alone has {len(prompt)} tokens, and --max-length is "
            f"{max_length}"
        )
    ids = (*prompt, *completion)
    return Encoded(ids[:max_length], len(prompt), cut=len(ids) > max_length)


def collate(items: Sequence[Encoded], pad_id: int) -> Batch:
    """One batch, filled up on the right; only completions have labels."""
    width = max(len(item.ids) for item in items)
    input_ids = torch.full((len(items), width), pad_id)
    mask = torch.zeros((len(items), width), dtype=torch.int64)
    labels = torch.full((len(items), width), IGNORED)
    for row, item in enumerate(items):
        ids = torch.tensor(item.ids)
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
        labels[row, item.prompt : len(ids)] = ids[item.prompt :]
    return Batch(input_ids, mask, labels)


def in_order(items: Sequence[Encoded], batch_size: int, pad_id: int) -> list[Batch]:
    """All items once, as they come."""
    return [collate(items[i : i + batch_size], pad_id) for i in range(0, len(items), batch_size)]


def shuffled(
    items: Sequence[Encoded], batch_size: int, steps: int, seed: int, pad_id: int
) -> Iterator[Batch]:
    """`steps` batches: one permutation of the items after the other, each item once in each."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(items), generator=generator).tolist()
        yield collate([items[i] for i in order[:batch_size]], pad_id)
        order = order[batch_size:]
