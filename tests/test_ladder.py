"""The ladder of strategies: every rung is judged alike, the best is taken, and a killed climb goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest

import transfermium as tm
from tests.alloys import QUICK, alloys, gap_model, potential, same_bits, weights_of
from transfermium import cli
from transfermium.data import Split
from transfermium.report import run_report
from transfermium.transfer import ladder, learn
from transfermium.transfer.ladder import RUNGS, Rung, printable_ladder
from transfermium.transfer.learn import STRATEGIES

GAP = tm.Property("gap")


def shifted(n: int = 20) -> list[ase.Atoms]:
    """Alloys whose energies are those of the base's labels, moved by a reference of each element."""
    structures = alloys(n, seed=5)
    for atoms in structures:
        atoms.calc.results["energy"] += float(np.where(atoms.numbers == 79, 3.0, -2.0).sum())
    return structures


def climb(objective: tm.Objective = GAP, base: tm.Model | None = None, n: int = 20, **options: Any) -> tm.Model:
    structures = alloys(n, seed=1) if isinstance(objective, tm.Property) else shifted(n)
    options = {"steps": 3, "valid_fraction": 0.3, **QUICK, **options}
    base = base or (gap_model() if isinstance(objective, tm.Property) else potential())
    return tm.finetune(base, structures, objective, strategy="auto", **options)


def table_of(model: tm.Model) -> dict[str, Any]:
    found: dict[str, Any] = model.card["history"][-1]["ladder"]
    return found


def test_every_rung_is_judged_on_the_same_structures_and_the_best_is_taken(tmp_path: Path) -> None:
    model = climb(out=tmp_path / "run")
    found = table_of(model)
    assert [rung["name"] for rung in found["rungs"]] == list(RUNGS)
    errors = {rung["name"]: rung["errors"]["gap"]["mae"] for rung in found["rungs"]}
    assert found["taken"] == min(errors, key=errors.__getitem__)

    splits = [Split.load(tmp_path / "run" / "rungs" / name / "split.json") for name in RUNGS]
    assert all(split.valid.tolist() == splits[0].valid.tolist() for split in splits)
    structures = alloys(20, seed=1)
    held_out = [structures[i] for i in splits[0].valid]
    for name, error in errors.items():
        rung = tm.load(tmp_path / "run" / "rungs" / name)
        assert tm.evaluate(rung, held_out, verbose=False)["gap"]["mae"] == pytest.approx(error, rel=1e-5)
    taken = tm.load(tmp_path / "run" / "rungs" / found["taken"])
    assert same_bits(weights_of(model), weights_of(taken))
    assert [stage["verb"] for stage in model.card["history"]] == ["pretrain", "finetune"]


def test_a_probe_of_few_labels_is_better_than_one_step() -> None:
    assert table_of(climb(tm.Potential(), steps=1, lr=1e-9))["taken"] == "probe"


def test_options_of_training_reach_the_rungs_that_train(tmp_path: Path) -> None:
    climb(out=tmp_path / "run", steps=1, lr=0.01)
    configs = {name: json.loads((tmp_path / "run" / "rungs" / name / "config.json").read_text()) for name in RUNGS}
    rates = {name: config["train"]["lr"] for name, config in configs.items() if config["train"]["steps"]}
    assert rates == dict.fromkeys(["head", "lora", "full"], 0.01)


def test_a_base_that_is_right_already_stays_as_it_is() -> None:
    base = potential()
    taught = tm.predict(base, alloys(20, seed=1), verbose=False)
    model = tm.finetune(base, taught, tm.Potential(), strategy="auto", steps=2, valid_fraction=0.3, **QUICK)
    assert table_of(model)["taken"] in ("zero-shot", "aligned")  # alignment moves it by rounding alone
    assert table_of(model)["rungs"][0]["errors"]["forces"]["mae"] < 1e-6
    assert same_bits(weights_of(model, "backbone."), weights_of(base, "backbone."))


def test_each_rung_is_the_strategy_of_its_name(tmp_path: Path) -> None:
    climb(base=gap_model(), out=tmp_path / "run", rank=2, layer_decay=0.9)
    options: dict[str, Any] = {"steps": 3, "valid_fraction": 0.3, "layer_decay": 0.9, **QUICK}
    for name in ("head", "lora", "full"):
        own = {"rank": 2} if name == "lora" else {}
        alone = tm.finetune(gap_model(), alloys(20, seed=1), GAP, strategy=name, **own, **options)
        assert same_bits(weights_of(alone), weights_of(tm.load(tmp_path / "run" / "rungs" / name)))


def test_what_cannot_be_tried_is_no_rung() -> None:
    def names(objective: tm.Objective, **options: Any) -> list[str]:
        return [rung["name"] for rung in table_of(climb(objective, steps=0, **options))["rungs"]]

    assert names(tm.Potential()) == ["zero-shot", "aligned", "probe", "head", "lora", "full"]
    assert names(tm.Potential(conservative=False)) == ["zero-shot", "aligned", "head", "lora", "full"]
    assert names(GAP, align=False, backbone_lr=0.0) == ["zero-shot", "probe", "head"]
    assert names(GAP, base=potential()) == ["probe", "head", "lora", "full"]  # it has no gap


def test_a_probe_that_has_too_few_labels_is_left() -> None:
    options = {**QUICK, "split_by": "auto", "valid": alloys(12, seed=3), "steps": 1}
    model = tm.finetune(potential(), alloys(2), tm.Potential(), strategy="auto", **options)
    failed = {rung["name"]: rung["failed"] for rung in table_of(model)["rungs"]}
    assert failed["probe"] == "nothing: too few labels"


def test_the_folder_is_that_of_a_run(tmp_path: Path) -> None:
    climb(out=tmp_path / "run")
    model = tm.load(tmp_path / "run")
    taken = tmp_path / "run" / "rungs" / table_of(model)["taken"]
    for name in ("labels.json", "split.json", "validation.json"):
        assert (tmp_path / "run" / name).read_bytes() == (taken / name).read_bytes()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["strategy"] == "auto"
    assert "ladder" in run_report(tmp_path / "run").with_suffix(".json").read_text()
    with pytest.raises(tm.InputError, match="holds another run"):
        climb(out=tmp_path / "run", steps=4)


def test_a_climb_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = climb(out=tmp_path / "whole", n=15)
    saved = tm.Model.save

    def dying(model: tm.Model, path: Path) -> None:
        if Path(path).parent.name == "head":
            raise KeyboardInterrupt
        saved(model, path)

    with monkeypatch.context() as patch:
        patch.setattr(tm.Model, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            climb(out=tmp_path / "run", n=15)
    finished = [tmp_path / "run" / "rungs" / name / "model.safetensors" for name in ("zero-shot", "aligned", "probe")]
    before = [path.stat().st_mtime_ns for path in finished]
    again = climb(out=tmp_path / "run", n=15)
    assert [path.stat().st_mtime_ns for path in finished] == before
    assert same_bits(weights_of(again), weights_of(whole))
    rows = [[{**rung, "seconds": 0} for rung in table_of(model)["rungs"]] for model in (again, whole)]
    assert rows[0] == rows[1]

    monkeypatch.setattr(learn, "climbed", None)  # what is finished is not climbed again
    assert same_bits(weights_of(climb(out=tmp_path / "run", n=15)), weights_of(whole))


def test_what_a_rung_took_is_kept(tmp_path: Path) -> None:
    first = climb(out=tmp_path / "run", n=15)
    (tmp_path / "run" / "model.safetensors").unlink()
    assert table_of(climb(out=tmp_path / "run", n=15)) == table_of(first)


def test_a_rung_that_diverges_is_told_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(given: dict[str, Any], strategy: str, out: Path | None) -> tm.Model:
        if strategy == "full":
            raise tm.InputError("the loss is not finite at step 3")
        return rung(given, strategy, out)

    rung = learn._rung
    monkeypatch.setattr(learn, "_rung", diverging)
    found = table_of(climb(steps=0))
    assert found["rungs"][-1]["failed"] == "nothing: training diverged"
    assert printable_ladder(found)[-1]["trained"] == "nothing: training diverged"
    assert found["taken"] != "full"


def test_quantities_count_alike_whatever_their_unit() -> None:
    def rung(energy: float, forces: float) -> Rung:
        return Rung("", "", {"energy_per_atom": {"mae": energy}, "forces": {"mae": forces}}, 0.0)

    assert rung(0.01, 0.4).error < rung(0.03, 0.2).error < rung(0.05, 0.2).error
    assert rung(0.01, 0.4).error / rung(0.03, 0.2).error == pytest.approx(
        rung(10, 0.4).error / rung(30, 0.2).error  # meV
    )
    assert Rung("", "", {"gap": {"mae": 0.2}}, 0.0).error == pytest.approx(0.2)
    assert Rung("", "", {}, 0.0).error == math.inf


def test_a_table_shows_units_and_what_is_taken() -> None:
    rungs = [
        {"name": name, "trained": RUNGS[name], "errors": {"energy_per_atom": {"mae": mae, "unit": "eV/atom"}},
         "seconds": 1.234, "failed": ""}
        for name, mae in (("aligned", 0.0123), ("head", 0.5))
    ]  # fmt: skip
    first, second = printable_ladder({"taken": "aligned", "rungs": rungs})
    assert first["rung"] == "aligned ←" and second["rung"] == "head"
    assert first["energy per atom (meV/atom)"] == "12.3" and first["seconds"] == "1.23"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"valid_fraction": 0.0}, "there are none: give some, or a strategy"),
        ({"n": 9}, "needs 10 structures to choose by, but there are 9: choose 'aligned' or 'probe'"),
        ({"rank": 0}, "rank is 0"),
        ({"lr": -1.0}, "lr is -1"),
    ],
    ids=str,
)
def test_what_cannot_be_climbed_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(tm.InputError, match=words):
        climb(**options)


def test_a_rehearsal_writes_nothing(tmp_path: Path) -> None:
    model = climb(out=tmp_path / "run", dry_run=True)
    assert model.card["dry run"]["steps"] == 3
    assert not (tmp_path / "run").exists()


def test_all_rungs_are_strategies() -> None:
    assert set(RUNGS) < set(STRATEGIES) and ladder.LEAST == 10


def test_the_command_line_shows_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ase.io.write(tmp_path / "few.extxyz", alloys(12, seed=1))
    potential().save(tmp_path / "base.safetensors")
    words = f"finetune {tmp_path}/base.safetensors {tmp_path}/few.extxyz --objective Property --objective.name gap"
    options = f"--strategy auto --valid-fraction 0.3 --split-by random --steps 1 --device cpu --out {tmp_path}/run"
    cli.main([*words.split(), *options.split()])
    taken = table_of(tm.load(tmp_path / "run"))["taken"]
    shown = capsys.readouterr().err
    assert "Rung 4 of 4: full" in shown and f"{taken} ←" in shown
    assert f"Taken: {taken}, the best of 4 rungs on 4 validation structures" in shown
    assert (tmp_path / "run" / "report.html").exists()
