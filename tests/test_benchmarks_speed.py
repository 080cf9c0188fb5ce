"""The records of the speed benchmark, and the tables that are computed from them."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "speed"
KEYS = (
    "workload task system version backbone parameters width layers edges_per_step stress structures_per_s cpu_s ms "
    "seconds_to_target peak_mb threads machine date"
)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("records", monkeypatch)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("table", monkeypatch)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("run", monkeypatch)


def test_a_record_has_the_keys_that_readers_rely_on(records: ModuleType) -> None:
    assert list(records.record()) == KEYS.split()
    assert records.record(task="train")["ms"] is None


def test_a_misspelt_key_is_refused(records: ModuleType) -> None:
    with pytest.raises(KeyError, match="peek_mb"):
        records.record(peek_mb=1.0)


def test_a_newer_record_takes_the_place_of_the_older(records: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for one in (trained("schnetpack", 1.0), trained("transfermium", 2.0), trained("schnetpack", 3.0)):
        records.save(records.added(records.load(file), one), file)
    records.save(records.added(records.load(file), trained("schnetpack", 4.0, threads=2)), file)
    assert [one["structures_per_s"] for one in records.load(file)] == [3.0, 2.0, 4.0]


def test_every_committed_record_is_complete(records: ModuleType) -> None:
    found = records.load()
    assert all(set(KEYS.split()) <= set(one) <= set(records.KEYS) | set(records.EXTRAS) for one in found)
    assert len(set(map(records.identity, found))) == len(found)


def test_a_win_is_a_ratio_above_one_and_a_loss_is_said(table: ModuleType) -> None:
    ahead = [trained("transfermium", 4.0), trained("schnetpack", 2.0)]
    assert [claim.ratio for claim in table.claims(ahead) if "train" in claim.about and "peak" not in claim.about] == [2]
    assert table.losses(ahead) == "Nowhere in these measurements."

    behind = [trained("transfermium", 1.0), trained("schnetpack", 2.0)]
    assert "- train W1, PaiNN, 1 thread: schnetpack PaiNN is 2.00× better." in table.losses(behind)

    short = [trained("transfermium", 2.4), trained("schnetpack", 2.0)]
    assert "short of 1.50×" in table.losses(short)


def test_other_architectures_are_losses_too_but_no_bars(table: ModuleType) -> None:
    found = [trained("transfermium", 4.0), trained("schnetpack", 9.0) | {"backbone": "SchNet"}]
    assert "the fastest architecture" in table.losses(found)
    assert not any("SchNet" in claim.who for claim in table.claims(found))


def test_not_arriving_is_a_loss_only_when_another_arrives(table: ModuleType) -> None:
    ours, theirs = arrived("transfermium", None), arrived("schnetpack", 90.0)
    assert "schnetpack PaiNN arrives, we do not" in table.losses([ours, theirs])
    assert "arrives" not in table.losses([ours, arrived("schnetpack", None)])
    assert [claim.ratio for claim in table.claims([arrived("transfermium", 30.0), theirs])] == [3]


def test_memory_above_the_bar_is_said(table: ModuleType) -> None:
    large = trained("transfermium", 9.0) | {"peak_mb": 2000.0}
    assert "peak MB of train W1, PaiNN, 1 thread" in table.losses([large])


def test_an_import_may_cost_a_little_more_than_that_of_torch(table: ModuleType) -> None:
    def imports(ms: float) -> list[dict[str, Any]]:
        about = {"task": "startup", "what": "import", "threads": 1}
        return [one_of("torch", ms=1000.0, **about), one_of("transfermium", ms=ms, **about)]

    assert table.losses(imports(1250.0)) == "Nowhere in these measurements."
    assert "torch" in table.losses(imports(1400.0))


def test_tables_stand_between_the_markers(table: ModuleType) -> None:
    found = [trained("transfermium", 4.0), trained("schnetpack", 2.0), arrived("transfermium", None)]
    text = table.between_markers(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", table.full(found))
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| **transfermium PaiNN** | 64 × 3 | 160,641 | 4 |" in text
    assert "not in 240 s (0.20)" in text and "not in 240 s (0.20)" in table.short(found)
    with pytest.raises(ValueError, match="needs the lines"):
        table.between_markers("no markers", "")


def test_nothing_measured_makes_no_tables(table: ModuleType) -> None:
    assert table.full([]) == "Nothing has been measured yet."


def test_rounds_become_medians(run: ModuleType) -> None:
    measurement = run.Measurement("train", "W1", 1, run.SYSTEMS[0])
    rounds = [{"ms": ms, "stress": False, "version": "0", "load": ms / 10} for ms in (1.0, 9.0, 2.0)]
    one = run.finished(measurement, rounds)
    assert (one["ms"], one["stress"], one["load"], one["rounds"]) == (2.0, False, 0.9, 3)
    assert one["backbone"] == run.SYSTEMS[0].backbone
    json.dumps(one)


def test_the_first_learning_rate_at_the_target_wins_and_bounds_the_others(run: ModuleType) -> None:
    caps = []

    def attempt(lr: float, cap: float) -> dict[str, Any]:
        caps.append(cap)
        return {"lr": lr, "cpu_s": {1e-3: 50.0, 2e-3: 20.0, 5e-3: None}[lr], "best": lr}

    assert run.best_of_rates(attempt, 600.0)["lr"] == 2e-3
    assert caps == [600.0, 50.0, 20.0]
    assert run.best_of_rates(lambda lr, cap: {"lr": lr, "cpu_s": None, "best": -lr}, 600.0)["lr"] == 5e-3


def test_everything_that_is_measured_has_its_own_place(run: ModuleType, records: ModuleType) -> None:
    labels = [one.labels for one in run.everything(["1", "2"])]
    assert len(set(map(records.identity, labels))) == len(labels)
    assert {one["task"] for one in labels} == {"train", "infer", "infer_ase", "prepare", "startup", "to_accuracy"}


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the benchmark, which imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    __import__(name)
    return sys.modules[name]


def trained(system: str, structures_per_s: float, threads: int = 1) -> dict[str, Any]:
    seconds = 4 / structures_per_s
    return one_of(
        system,
        task="train",
        threads=threads,
        structures_per_s=structures_per_s,
        ms=1e3 * seconds,
        cpu_s=seconds,
        peak_mb=900.0,
        edges_per_step=40_000,
        stress=False,
        baseline_mb=300.0,
        warm_up_s=1.0,
    )


def arrived(system: str, seconds: float | None) -> dict[str, Any]:
    about = {
        "target": 0.1,
        "best": 0.2 if seconds is None else 0.09,
        "lr": 1e-3,
        "steps": 70,
        "cap": 240.0,
        "warm_up_s": 1.0,
    }
    return one_of(system, task="to_accuracy", threads=1, seconds_to_target=seconds, cpu_s=seconds, **about)


def one_of(system: str, **values: Any) -> dict[str, Any]:
    about = {"workload": "W1", "backbone": "PaiNN", "parameters": 160_641, "width": 64, "layers": 3}
    where = {"system": system, "version": "1.0", "machine": "a machine", "date": "2026-01-01", "load": 0.1}
    return dict.fromkeys(KEYS.split()) | about | where | values
