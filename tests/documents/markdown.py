"""A Markdown document's parts, as a CommonMark parser reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Document:
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    @cached_property
    def examples(self) -> list[str]:
        """The blocks of Python."""
        return [t.content for t in self._tokens if t.type == "fence" and t.info.strip() == "python"]

    @cached_property
    def commands(self) -> list[str]:
        """Lines of indented blocks and words in backticks that a shell would take."""
        lines = [
            line.strip() for t in self._tokens if t.type == "code_block" for line in t.content.splitlines()
        ]
        lines += [t.content for t in self._inline() if t.type == "code_inline"]
        return [
            line for line in lines if re.match(r"(\w+=\S* )*(make|python|pip|cmake|fused-lora) [\w.-]", line)
        ]

    @cached_property
    def links(self) -> list[str]:
        """Where links and pictures lead."""
        targets = (t.attrs.get("href", t.attrs.get("src")) for t in self._inline() if t.attrs)
        return [str(target) for target in targets if target]

    @cached_property
    def anchors(self) -> set[str]:
        """Of its headings, as GitHub and MyST name them."""
        headings = (
            after
            for t, after in zip(self._tokens, self._tokens[1:], strict=False)
            if t.type == "heading_open"
        )
        words = ("".join(c.content for c in heading.children or ()) for heading in headings)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in words}

    def _inline(self) -> Iterator[Token]:
        return (child for t in self._tokens for child in t.children or ())


MANUAL = [Document(path) for path in sorted((ROOT / "docs").glob("*.md"))]
README, CONTRIBUTING, CHANGELOG, EMULATOR = (
    Document(ROOT / name)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/emulator/README.md")
)
DOCUMENTS = [README, *MANUAL]  # a user's
EVERYWHERE = [*DOCUMENTS, CONTRIBUTING, CHANGELOG, EMULATOR]
