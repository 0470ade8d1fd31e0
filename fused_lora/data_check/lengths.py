"""Examples in tokens, against what the model can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_lora.data_check.report import DataError, Finding
from fused_lora.data_check.rows import Row


@dataclass(frozen=True)
class Tokens:
    """How many tokens an example has, and how many may be."""

    count: Callable[[str, str], int]
    limit: int

    @classmethod
    def of(cls, directory: Path, limit: int | None = None) -> Tokens:
        """By the tokenizer of a transformers directory, in its chat's form if it has one. The limit is the
        model's context, or a lower one."""
        try:
            import transformers
        except ImportError as error:
            raise ImportError(f"transformers does not import ({error}): pip install transformers") from error
        if not (directory / "config.json").is_file():
            raise DataError(f"{directory}: holds no config.json, so it is no transformers model")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # of many kinds: whatever the files' values run into
            raise DataError(f"{directory}: {error}") from error
        context = getattr(config, "max_position_embeddings", None)
        limits = [number for number in (limit, context) if number is not None]
        if not limits:
            raise DataError(f"{directory}: its configuration names no context; give --max-length")
        if limit is not None and limit > min(limits):
            raise DataError(f"--max-length {limit}: the model reads {context} tokens at most")
        return cls.by(tokenizer, min(limits))

    @classmethod
    def by(cls, tokenizer: Any, limit: int) -> Tokens:
        """By one of transformers' tokenizers."""
        return cls(lambda prompt, completion: _count(tokenizer, prompt, completion), limit)


def _count(tokenizer: Any, prompt: str, completion: str) -> int:
    if tokenizer.chat_template and prompt:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = f"{prompt}\n{completion}" if prompt else completion
    return len(tokenizer(text)["input_ids"]) + 1  # and the token that ends it


def too_long(rows: Sequence[Row], tokens: Tokens) -> Iterator[Finding]:
    for row in rows:
        # Half of a surrogate pair, which is a fault of its own, is nothing that a tokenizer takes.
        prompt, completion = (
            text.encode("utf-8", "replace").decode("utf-8") for text in (row.prompt, row.completion)
        )
        count = tokens.count(prompt, completion)
        if count > tokens.limit:
            yield Finding("too-long", row.place, f"{count:,} tokens, and {tokens.limit:,} are read")
