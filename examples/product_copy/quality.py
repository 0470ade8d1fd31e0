"""The examples' quality, by the check that fused-lora check-data runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.product_copy.data import Example
from fused_lora.data_check import Report, Row, Tokens
from fused_lora.data_check import check as check_rows


def check(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Report:
    rows = [Row(f"line {e.line}", e.prompt, e.completion, e.heldout) for e in examples]
    return check_rows(rows, tokens=Tokens.by(tokenizer, max_length), region="GB")
