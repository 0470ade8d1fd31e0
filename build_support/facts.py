"""The facts of a build: baked into the binary, and written beside it to be compared before loading."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

FILE_NAME = "_build.json"


def commit(root: Path) -> str:
    """The checkout's commit, marked where the tree differs from it; "unknown" outside a checkout."""
    if not (root / ".git").exists():
        return "unknown"
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def write_header(facts: Mapping[str, str], path: Path) -> None:
    """A header of its own, rewritten only when it changes, so that a new commit recompiles one file."""
    pairs = ", ".join(f"{{{json.dumps(key)}, {json.dumps(value)}}}" for key, value in facts.items())
    text = f"#pragma once\n#define FUSED_LORA_BUILD_FACTS {pairs}\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_json(facts: Mapping[str, str], directory: Path) -> None:
    (directory / FILE_NAME).write_text(json.dumps(facts, indent=2) + "\n")
