"""What is wrong with the examples a model is to be tuned on: found before the hours are spent.

    fused-lora check-data train.jsonl --held-out heldout.jsonl --model path/to/model

or, with examples that a program holds, `check(rows)`. It stands on ftfy, datasketch, phonenumbers and
python-stdnum, which the extra `data` installs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec

from fused_lora.data_check import damage, lengths, likeness
from fused_lora.data_check.lengths import Tokens
from fused_lora.data_check.personal import Privacy
from fused_lora.data_check.report import KINDS, DataError, Finding, Quote, Report
from fused_lora.data_check.rows import Fields, File, Row, read

__all__ = [
    "KINDS",
    "DataError",
    "Fields",
    "File",
    "Finding",
    "Quote",
    "Report",
    "Row",
    "Tokens",
    "check",
    "read",
]


def check(
    rows: Sequence[Row],
    *,
    tokens: Tokens | None = None,
    region: str | None = None,
    public: Collection[str] = (),
    allow: Collection[str] = (),
    found: Iterable[Finding] = (),
) -> Report:
    """Every kind of fault in `rows`, of which some may be held out.

    `tokens` counts an example's tokens against the model's context; without it lengths are not checked.
    `region`, as "GB", reads telephone numbers as they are written at home; without it only those that begin
    with + are found. `public` are contact details that may stand. What is of a kind in `allow` is shown and
    does not fail. `found` is what reading the rows has found already.
    """
    found = list(found)
    if not rows and not found:
        raise DataError("there are no examples to check")
    unknown = sorted(set(allow) - set(KINDS))
    if unknown:
        raise DataError(f"allow: {', '.join(unknown)} is no kind of fault; there are {', '.join(KINDS)}")
    _demand_libraries()
    privacy = Privacy(region, public)
    findings = [
        *found,
        *damage.empty(rows),
        *damage.truncated(rows),
        *damage.encoding(rows),
        *likeness.repeated(rows),
        *likeness.similar(rows),
        *(lengths.too_long(rows, tokens) if tokens else ()),
        *privacy.personal(rows),
    ]
    unchecked = {} if tokens else {"too-long": "not checked: no model was given"}
    return Report(
        train=sum(not row.held_out for row in rows),
        held_out=sum(row.held_out for row in rows),
        findings=findings,
        allowed=frozenset(allow),
        unchecked=unchecked,
        mask=privacy.mask,
    )


def _demand_libraries() -> None:
    missing = [name for name in ("datasketch", "ftfy", "phonenumbers", "stdnum") if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'fused-lora[data]'")
