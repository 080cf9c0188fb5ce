"""The documentation leaves no page out, and its links stay inside it, which is all that can be published of it."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)


def test_every_page_is_in_the_index() -> None:
    trees = re.findall(r"```\{toctree\}(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    listed = [line for tree in trees for line in tree.split("\n") if line and not line.startswith(":")]
    pages = [str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if page.stem != "index"]
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere_inside(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"https?://", target):
            found = (page.parent / target).resolve()
            assert found.is_file() and found.is_relative_to(DOCS), target
