"""The pages that follow from the code are up to date, and what pages link to or name exists."""

import re
import runpy

import pytest

from tests.docs.test_docs import BLOCK, DOCS, PAGES
from tests.tiny import ROOT

TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
GENERATED = DOCS / "reference"
FILE = re.compile(r"`((?:configs|docs|reprotune|recipes|stages|templates|tests)/[\w./-]*\w)`")
"""A path of this repository, written as code."""


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        # as `python docs/generate.py` finds its own modules
        patch.syspath_prepend(DOCS)
        return runpy.run_path(str(DOCS / "generate.py"))["pages"]()


def test_the_reference_is_up_to_date(generated):
    stale = [name for name, text in generated.items() if (GENERATED / name).read_text() != text]
    assert not stale, f"{', '.join(stale)}: out of date; `python docs/generate.py` writes docs/reference"


def test_the_reference_has_no_other_page(generated):
    assert {page.name for page in GENERATED.iterdir()} == set(generated)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(page):
    text = BLOCK.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    missing = [path for path in FILE.findall(text) if not (ROOT / path).exists()]
    assert not missing


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == {page.relative_to(DOCS).as_posix() for page in PAGES} - {"README.md"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
