"""The README runs, with fewer steps, and its images are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block
    exec(re.sub(r"steps=\d+", "steps=2", block.group(1)), {})
    assert Path("r2scan.safetensors").is_file()


READABLE = [
    *ROOT.glob("*.md"),
    *ROOT.glob("recipes/**/*.md"),
    *ROOT.glob("benchmarks/**/*.md"),
    *ROOT.glob("datasets/**/*.md"),
    *ROOT.glob("src/**/*.md"),
]


@pytest.mark.parametrize("page", READABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert re.match(r"https?://", target) or (page.parent / target).exists(), target


def test_no_placeholder_is_left() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("recipes/*.md"), *ROOT.glob("src/transfermium/crystals/*.md")]:
        assert not re.search(r"\b(RESULTS?|PACK|COUNTS|TODO|SILICON|MATBENCH)\b", page.read_text()), page
