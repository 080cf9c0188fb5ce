"""The demo runs from end to end, goes on where it stopped, and says what its numbers say."""

import json
from pathlib import Path

from transfermium.study.demo import demo, verdict


def test_the_demo_writes_a_report_and_resumes(tmp_path: Path) -> None:
    sizes = {"sizes": (5, 10), "seeds": (0, 1), "steps": 2, "pretraining": 2}
    page = demo(tmp_path / "demo", **sizes)
    assert page.is_file()
    result = json.loads((tmp_path / "demo/results.json").read_text())
    assert len(result["cells"]) == 3 * 2 * 2
    assert {(c["arm"], c["labels"], c["seed"]) for c in result["cells"]} == {
        (arm, n, seed) for arm in ("shift", "scratch", "transfer") for n in (5, 10) for seed in (0, 1)
    }

    (model,) = (tmp_path / "demo/cells").glob("arm-transfer-10-1-*/0.003/model.safetensors")
    before = model.stat().st_mtime_ns
    demo(tmp_path / "demo", **sizes)
    again = json.loads((tmp_path / "demo/results.json").read_text())
    assert again["cells"] == result["cells"]
    assert model.stat().st_mtime_ns == before


def made_up(scratch: list[list[float]], transfer: list[list[float]]) -> dict:
    """Errors by size and seed as the demo's result."""
    from transfermium.study.demo import _result

    cells = [
        {"arm": arm, "labels": n, "seed": seed, "forces": value, "energy_per_atom": value}
        for arm, errors in (("scratch", scratch), ("transfer", transfer), ("shift", transfer))
        for n, row in zip((10, 20, 40), errors, strict=True)
        for seed, value in enumerate(row)
    ]
    return _result(cells, [1.0], 1.0)


HIGH = [[0.40, 0.41, 0.42], [0.30, 0.31, 0.32], [0.20, 0.21, 0.22]]


def test_the_verdict_counts_the_labels_saved() -> None:
    low = [[0.10, 0.11, 0.12], [0.09, 0.10, 0.11], [0.08, 0.09, 0.10]]
    assert "40 labels are not enough" in verdict(made_up(HIGH, low))
    assert "adds nothing measurable" in verdict(made_up(HIGH, low))
    middle = [[0.25, 0.26, 0.27], [0.24, 0.25, 0.26], [0.15, 0.16, 0.17]]
    assert "between 20 and 40 labels" in verdict(made_up(HIGH, middle))


def test_the_verdict_admits_that_nothing_was_gained() -> None:
    assert "does not help" in verdict(made_up(HIGH, HIGH))
    worse = [[2 * value for value in row] for row in HIGH]
    assert "hurts at 10 and 20 and 40" in verdict(made_up(HIGH, worse))
