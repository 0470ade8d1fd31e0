"""Sphinx builds the manual: Markdown by MyST, the reference from the docstrings, Furo's plain theme."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, os.fspath(ROOT))  # the checkout's package is documented, not an installed one

from fused_lora import __version__  # noqa: E402

project = "fused-lora"
release = __version__
copyright = "the authors of fused-lora, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["drawings/*.py"]
myst_heading_anchors = 3
default_role = "py:obj"  # `add_lora` in a docstring leads there
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Targets": "Targets"}
maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_param = False  # arguments that are described together stay together

html_theme = "furo"
html_title = f"fused-lora {release}"
html_show_sphinx = False
html_copy_source = False

linkcheck_timeout = 20
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]


def show_indented_blocks(
    app: object, what: str, name: str, of: object, options: object, lines: list[str]
) -> None:
    """What a docstring indents after an empty line is an equation or code: shown as it stands."""
    shown: list[str] = []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        before = next((other for other in reversed(shown) if other), "")
        outer = len(before) - len(before.lstrip())
        # A list's item is indented less than its second paragraph.
        is_text = re.match(r"\s*(:|\*|-|\.\. )", before) is None
        if line and before and not shown[-1] and indent >= outer + 4 and is_text:
            shown += [" " * outer + "::", ""]
        shown.append(line)
    lines[:] = shown


def link_to_files(app: object, page: str, source: list[str]) -> None:
    """Markdown outside of the manual is no page of it: a link leads to the file, as to any other."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])


def setup(app: object) -> None:
    app.connect("source-read", link_to_files)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", show_indented_blocks)  # type: ignore[attr-defined]
