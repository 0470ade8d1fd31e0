"""Links within the repository lead somewhere. make docs ARGS='-b linkcheck' checks those outwards."""

from __future__ import annotations

import pytest

from tests.documents.markdown import EVERYWHERE, MANUAL, Document


@pytest.mark.parametrize("document", EVERYWHERE, ids=lambda d: d.name)
def test_every_link_leads_somewhere(document: Document):
    for link in document.links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = document.path.parent / file if file else document.path
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in Document(target).anchors, f"{document.name}: {link}"


def test_every_page_of_the_manual_is_linked():
    linked = {link.partition("#")[0] for page in MANUAL for link in page.links}
    assert {page.path.name for page in MANUAL} <= {"index.md", *linked}
