"""The manual is built without a warning, is complete, and its drawings are what their program draws."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from sphinx.cmd.build import build_main

import fused_lora
from docs.drawings import DRAWINGS, FOLDER
from tests.documents.markdown import MANUAL, ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The manual in HTML. A warning, as of a docstring that is no markup, is an error."""
    folder = tmp_path_factory.mktemp("manual")
    assert build_main(["-W", "--keep-going", "-q", str(ROOT / "docs"), str(folder)]) == 0
    return folder


def test_the_reference_holds_every_public_name(built):
    reference = (built / "api.html").read_text(encoding="utf-8")
    described = set(re.findall(r'id="fused_lora\.(\w+)"', reference))
    missing = set(fused_lora.__all__) - described - {"__version__"}
    assert not missing, f"docs/api.md lacks {missing}"
    assert {"ColwiseLoRA", "RowwiseLoRA"} <= set(
        re.findall(r'id="fused_lora\.distributed\.(\w+)"', reference)
    )


def test_docstrings_show_code_and_equations_as_they_stand(built):
    reference = (built / "api.html").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"<pre>.*?</pre>", reference, re.DOTALL))
    assert "y[i] = x[i] Wᵀ + b" in blocks
    assert "batch_of_four" in blocks


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_up_to_date(name):
    drawn = str(DRAWINGS[name]())
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawn, "python -m docs.drawings"
    picture = ElementTree.fromstring(drawn)
    assert picture.find("{*}title") is not None
    assert picture.find("{*}desc") is not None


def test_every_picture_is_a_drawing_of_the_manuals():
    shown = [name for page in MANUAL for name in re.findall(r"!\[[^]]+\]\(drawings/(\w+)\.svg\)", page.text)]
    assert sorted(shown) == sorted(DRAWINGS)
