"""What the benchmark of intervals says of its results."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "statistics"


@pytest.fixture
def coverage() -> ModuleType:
    spec = spec_from_file_location("coverage_of_intervals", FOLDER / "coverage.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results() -> dict[str, Any]:
    return json.loads((FOLDER / "results.json").read_text())


def test_single_sizes_are_looked_at_too(coverage: ModuleType, results: dict[str, Any]) -> None:
    assert "floor, four sizes, 3 seeds: factor at 90 labels 0.855" in results["outside"]
    assert coverage.outside(results["cases"]) == results["outside"]


def test_the_page_says_what_single_sizes_have(results: dict[str, Any]) -> None:
    page = " ".join((FOLDER / "README.md").read_text().split())
    lowest, highest, of = re.search(r"Single sizes have (\S+) to (\S+) %, but for one of (\d+)", page).groups()
    worst, *shares = sorted(share for row in results["cases"] for share in row["coverage of factors by size"])
    assert (100 * shares[0], 100 * shares[-1], len(shares) + 1) == pytest.approx(
        (float(lowest), float(highest), int(of))
    )
    assert f"is held in {100 * worst:.1f} %" in page and f"coverage is still {100 * worst:.1f} %" in page
    assert sum(share > 0.99 for share in shares) == 11 and "Eleven have more than 99 %" in page
