"""Rows of JSON lines or CSV, as prompts and completions."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_lora.data_check.report import DataError, Finding

# The fields that a prompt is made of, and the completion's; the first that a file's first row has is taken.
_PAIRS = (
    (("prompt",), "completion"),
    (("prompt",), "response"),
    (("instruction", "input"), "output"),
    (("instruction",), "output"),
    (("question",), "answer"),
    (("input",), "output"),
    ((), "text"),
)
_MESSAGES = "messages"
_TRAIN = ("train", "training")
_HELD_OUT = ("heldout", "held-out", "held_out", "test", "validation", "valid", "val", "eval", "dev")


@dataclass(frozen=True)
class Row:
    """An example. `prompt` is empty where the data is nothing but text to learn."""

    place: str
    prompt: str
    completion: str
    held_out: bool = False


@dataclass(frozen=True)
class Fields:
    """Which fields the prompt is made of, and which is the completion."""

    prompt: tuple[str, ...]
    completion: str

    def __str__(self) -> str:
        return f"prompt: {', '.join(self.prompt) or 'none'}; completion: {self.completion}"


_CONVERSATION = Fields((), _MESSAGES)


@dataclass(frozen=True)
class File:
    """The rows that can be read as such, what is wrong with the others, and what was read of them."""

    rows: list[Row]
    found: list[Finding]
    fields: Fields


def read(path: Path, fields: Fields | None = None, held_out: bool = False) -> File:
    """Reads a file of examples.

    Files ending in .csv and .tsv are tables with a header, all others JSON lines. Without `fields` they are
    those of the first row whose names say so. `held_out` holds out all rows; else a field "split" may.
    """
    text = _text(path)
    records = _table(text, path) if path.suffix.lower() in (".csv", ".tsv") else _json_lines(text, path)
    rows: list[Row] = []
    found: list[Finding] = []
    splits: bool | None = None
    types: dict[str, type] = {}  # of the fields, in the first row that has them
    for place, record in records:
        if isinstance(record, str):
            found.append(Finding("schema", place, record))
            continue
        if fields is None:
            fields = _recognised(record)
        if fields is None:
            found.append(
                Finding("schema", place, f"nothing in it is a prompt or completion: {_names(record)}")
            )
            continue
        if splits is None:
            splits = "split" in record
        try:
            apart = _held_out(record, splits)
            rows.append(Row(place, *_pair(record, fields, types), held_out or apart))
        except _SchemaError as error:
            found.append(Finding("schema", place, str(error)))
    if not rows and not found:
        raise DataError(f"{path}: holds no rows")
    if fields is None:
        raise DataError(
            f"{found[0].place}: {found[0].what}; nor has any other row a prompt and a completion. Name "
            "them: --prompt, --completion"
        )
    return File(rows, found, fields)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    for mark, name in ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if content.startswith(mark):
            raise DataError(f"{path}: is {name}; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: is not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error


def _json_lines(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    # Not splitlines(), which also breaks at characters that may stand within JSON's strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == 1 and line.strip() in ("[", "{"):
                raise DataError(f"{path}: is one JSON document; write an object a line") from error
            yield place, f"not JSON ({error})"
            continue
        except RecursionError:
            yield place, "not JSON that can be read: nested too deeply"
            continue
        if isinstance(record, dict):
            yield place, record
        elif number == 1 and isinstance(record, list):
            raise DataError(f"{path}: is one JSON array; write an object a line")
        else:
            yield place, f"not an object but {_kind(record)}"


def _table(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    header_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header_line.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begin = 1
    try:
        for cells in lines:
            place = f"{path.name}, line {begin}"
            begin = lines.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise DataError(f"{path}: two columns are called {twice[0]!r}")
            elif len(cells) != len(header):
                yield place, f"{len(cells)} cells under {len(header)} names"
            else:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: the row that begins on line {begin} is not CSV: {error}") from error


def _recognised(record: dict[str, Any]) -> Fields | None:
    if isinstance(record.get(_MESSAGES), list):
        return _CONVERSATION
    for prompt, completion in _PAIRS:
        if completion in record and all(name in record for name in prompt):
            return Fields(prompt, completion)
    return None


def _names(record: dict[str, Any]) -> str:
    return f"its fields are {', '.join(map(repr, record))}" if record else "it has no fields"


class _SchemaError(Exception):
    pass


def _pair(record: dict[str, Any], fields: Fields, types: dict[str, type]) -> tuple[str, str]:
    if fields == _CONVERSATION:
        return _conversation(record)
    texts = [_field(record, name, types) for name in fields.prompt]
    completion = _field(record, fields.completion, types)
    if len(texts) == 1:
        return texts[0], completion
    # An empty one among several, as an instruction's input, says nothing and may be so.
    named = [f"{name}: {text}" for name, text in zip(fields.prompt, texts, strict=True) if text.strip()]
    return "\n".join(named), completion


def _conversation(record: dict[str, Any]) -> tuple[str, str]:
    """The last message is to be learnt, and it must be the assistant's."""
    messages = record.get(_MESSAGES)
    if not isinstance(messages, list) or not messages:
        raise _SchemaError(f"{_MESSAGES!r} is not a list with entries")
    texts = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _SchemaError("a message is not an object with a role and content")
        texts.append((message["role"], _field(message, "content", {"content": str})))
    role, completion = texts[-1]
    if role != "assistant":
        raise _SchemaError(f"the last message is not the assistant's but has the role {role!r}")
    return "\n".join(f"{who}: {text}" for who, text in texts[:-1]), completion


def _field(record: dict[str, Any], name: str, types: dict[str, type]) -> str:
    """The field as text: an object or a list, as a product's attributes, as JSON."""
    if name not in record:
        raise _SchemaError(f"lacks {name!r}")
    value = record[name]
    if value is None:
        return ""
    if not isinstance(value, str | dict | list):
        raise _SchemaError(f"{name!r} is not text but {_kind(value)}")
    if not isinstance(value, first := types.setdefault(name, type(value))):
        raise _SchemaError(f"{name!r} is {_kind(value)}, where the first row has {_kind(first())}")
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if value else ""


def _held_out(record: dict[str, Any], splits: bool) -> bool:
    if ("split" in record) != splits:
        raise _SchemaError(f"{'lacks' if splits else 'has'} a 'split', unlike the first row")
    split = str(record.get("split", _TRAIN[0])).strip().lower()
    if split not in _TRAIN + _HELD_OUT:
        raise _SchemaError(f"'split' is none of {', '.join(_TRAIN + _HELD_OUT)}")
    return split in _HELD_OUT


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
