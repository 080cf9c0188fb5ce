"""Replay and the ledger: what a base still knows of its own task after it has learned another one."""

from __future__ import annotations

import functools
import json

import ase
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
import transfermium.transfer.replay
from tests.alloys import QUICK, alloys, gap_model, painn, potential, same_bits, weights_of, without
from tests.test_lora import stop_after
from tests.waters import waters
from transfermium import cli
from transfermium.dataset import TrainingData
from transfermium.report import run_report
from transfermium.train import TrainConfig
from transfermium.transfer.replay import Replay, beside, forgetting, generated

TUNING = {"steps": 40, "lr": 0.01, "valid_fraction": 0.2}


@pytest.fixture
def few(monkeypatch):
    """Generate few structures, to be quick."""
    monkeypatch.setattr(transfermium.transfer.replay, "FEWEST", 40)


def turned_round(n: int, seed: int) -> list[ase.Atoms]:
    """Alloys whose energies are those of `alloys` times minus two and shifted: what a base knows of forces is wrong."""
    structures = alloys(n, seed)
    for atoms in structures:
        energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        atoms.calc = SinglePointCalculator(
            atoms, energy=3 * len(atoms) - 2 * energy, forces=-2 * forces, stress=-2 * stress
        )
    return structures


@functools.cache
def base() -> tm.Model:
    """A potential that knows its task; leave it as it is."""
    return tm.pretrain(alloys(24, seed=7), tm.Potential(), painn(), steps=80, lr=0.01, **QUICK)


def tune(strategy: str = "replay", objective: tm.Objective | None = None, start: tm.Model | None = None, **options):
    structures = options.pop("structures", None) or turned_round(20, seed=3)
    if strategy == "replay":
        options = {"replay": alloys(24, seed=7), **options}
    return tm.finetune(
        start or base(), structures, objective or tm.Potential(), strategy=strategy, **{**TUNING, **QUICK, **options}
    )


def short(**options):
    return tune(**{"start": potential(), "steps": 2, "structures": turned_round(8, seed=3), **options})


def forgotten(model: tm.Model) -> dict:
    return model.card["history"][-1]["forgetting"]["errors"]


def forces_error(model: tm.Model) -> float:
    return tm.evaluate(model, turned_round(12, seed=11), verbose=False)["forces"]["mae"]


class TestForgetting:
    """The physics of it: a base that learns forces of the other sign."""

    @functools.cached_property
    def ledger(self) -> list[ase.Atoms]:
        return alloys(12, seed=9)

    def test_replay_forgets_less_than_full_and_learns_all_the_same(self, few):
        at_first = forces_error(tune("aligned", steps=None, lr=2e-3, ledger=self.ledger))
        full = tune("full", ledger=self.ledger)
        assert forgotten(full)["forces"]["after"] > 5 * forgotten(full)["forces"]["before"]
        for source in (alloys(24, seed=7), "generated"):
            model = tune(replay=source, ledger=self.ledger)
            assert forgotten(model)["forces"]["after"] < 0.25 * forgotten(full)["forces"]["after"]
            assert forgotten(model)["energy_per_atom"]["after"] < 0.75 * forgotten(full)["energy_per_atom"]["after"]
            assert forces_error(model) < 0.75 * at_first

    def test_a_small_weight_keeps_less(self):
        errors = [
            forgotten(tune(replay_weight=weight, ledger=self.ledger, steps=20))["forces"]["after"]
            for weight in (1e-3, 1.0)
        ]
        assert errors[1] < 0.5 * errors[0]


class TestReplay:
    def test_zero_steps_give_the_aligned_base(self):
        models = [short(strategy=strategy, steps=0) for strategy in ("replay", "full")]
        assert same_bits(*map(weights_of, models))
        reports = [model.card["history"][-1]["alignment"] for model in models]
        assert reports[0] == reports[1] and reports[0]["reference shift (eV)"]

    def test_the_model_is_one_of_the_new_task_alone(self, tmp_path):
        model = short(out=tmp_path)
        full = short(strategy="full")
        assert weights_of(model).keys() == weights_of(full).keys()
        assert model.outputs.keys() == {"energy", "forces", "stress"} and "parts" not in model.card
        assert model.card["objective"]["class"] == "Potential"
        assert model.card["metrics"]["validation"].keys() == full.card["metrics"]["validation"].keys()
        again = tm.load(tmp_path)
        assert same_bits(weights_of(again), weights_of(model))
        assert again.card == json.loads(json.dumps(model.card))
        assert tm.evaluate(again, turned_round(2, seed=1), verbose=False)["n"] == 2

    def test_the_base_and_the_structures_are_left_as_they_are(self):
        structures, replayed, before = turned_round(8, seed=3), alloys(6), weights_of(potential())
        short(structures=structures, replay=replayed)
        assert same_bits(before, weights_of(potential()))
        assert all(p.requires_grad for p in potential().parameters())
        assert not any("part" in atoms.info for atoms in (*structures, *replayed))

    def test_a_property_is_learned_beside_a_potential_and_the_other_way_round(self):
        for start, goal, known in ((potential(), tm.Property("gap"), "forces"), (gap_model(), tm.Potential(), "gap")):
            model = short(start=start, objective=goal, replay=alloys(10))
            assert known in forgotten(model)
            assert model.outputs.keys() == goal.outputs(4).keys()

    def test_the_new_task_chooses_the_checkpoint(self):
        """A model that is worse than the aligned base on the new task is not returned, whatever it does to the old."""
        ruined = short(steps=3, lr=10.0, valid_fraction=0.3)
        aligned = short(steps=0, valid_fraction=0.3)
        assert same_bits(weights_of(ruined), weights_of(aligned))

    def test_bond_vectors_of_a_head_that_the_new_task_does_not_have_go_on(self):
        backbone = tm.CGCNN(width=8, channels=8, cutoff=4.0, depth=1)
        start = tm.pretrain(alloys(8), tm.Denoise(0.1, conservative=False), backbone, steps=2, **QUICK)
        for steps in (0, 3):
            found = forgotten(short(start=start, replay=alloys(8), steps=steps, lr=0.05))["forces"]
            assert (found["before"] == found["after"]) == (steps == 0)

    @pytest.mark.parametrize("source", ["given", "generated"])
    def test_a_run_that_was_stopped_goes_on_to_the_same_bits(self, tmp_path, monkeypatch, few, source):
        options = {"steps": 5, "replay": alloys(10) if source == "given" else "generated", "validate_every": 2}
        expected = short(**options)
        stop_after(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            short(out=tmp_path, **options)
        monkeypatch.undo()
        monkeypatch.setattr(transfermium.transfer.replay, "FEWEST", 40)
        resumed = short(out=tmp_path, **options)
        assert same_bits(weights_of(resumed), weights_of(expected))
        assert resumed.card["history"][-1]["forgetting"] == expected.card["history"][-1]["forgetting"]

    def test_another_weight_or_source_is_another_run(self, tmp_path):
        short(out=tmp_path)
        with pytest.raises(tm.InputError, match=r"replay\.weight was 1\.0 there and is 0\.5 now"):
            short(out=tmp_path, replay_weight=0.5)
        with pytest.raises(tm.InputError, match=r"replay\.source was"):
            short(out=tmp_path, replay=alloys(11))

    def test_a_dry_run_counts_both_tasks(self):
        cost, full = (short(strategy=strategy, dry_run=True).card["dry run"] for strategy in ("replay", "full"))
        assert cost["structures"] > full["structures"] and cost["trained_parameters"] > full["trained_parameters"]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"replay": None}, "strategy 'replay' needs what to replay"),
            (
                {"strategy": "full", "replay": "generated"},
                "replay is for strategy 'replay', but the strategy is 'full'",
            ),
            ({"strategy": "lora", "replay_weight": 1.0}, "replay_weight is for strategy 'replay'"),
            ({"strategy": "full", "pseudo": True}, "pseudo is for strategy 'replay'"),
            ({"replay_weight": 0.0}, "replay_weight is 0.0, but must be above zero"),
            ({"backbone_lr": 0.0}, "strategy 'replay' trains the backbone, but backbone_lr=0 freezes it"),
            ({"objective": tm.Together({"a": tm.Potential()})}, "one objective beside the base's, not Together"),
            ({"replay": without(alloys(4), "energy", "forces", "stress")}, "replay: no structure has energy or forces"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
    )
    def test_what_makes_no_sense_is_refused(self, options, words):
        with pytest.raises(tm.InputError, match=words):
            short(**options)

    def test_noise_is_replayed_on_structures_and_not_predicted(self):
        noise = tm.pretrain(alloys(8), tm.Denoise(0.1), painn(), steps=2, **QUICK)
        assert "forces" in forgotten(short(start=noise, replay=alloys(12)))
        with pytest.raises(tm.InputError, match="has no labels to predict"):
            short(start=noise, replay="generated")

    def test_of_several_tasks_one_has_to_be_named(self):
        objective = tm.Together({"gap": tm.Property("gap"), "field": tm.Potential()})
        both = tm.pretrain(alloys(8), objective, painn(), steps=2, **QUICK)
        with pytest.raises(tm.InputError, match="name the one to remember with part: gap, field"):
            short(start=both)
        assert "forces" in forgotten(short(start=both, part="field"))


def joined(source: object, structures: list | None = None, pseudo: bool = False, **options):
    """What is learned side by side, and the ledger."""
    structures, objective = structures or turned_round(6, seed=3), tm.Potential()
    data = TrainingData(structures, objective, None, 0.0, "auto", None, None, None, None, 0, False)
    model = tm.finetune(potential(), structures, objective, steps=0, valid_fraction=0, **QUICK)
    config = TrainConfig(edges=400, device="cpu", dtype="float32")
    given = {"held_out": None, "ledger": None, **options}
    return beside(
        potential(), model, objective, data, Replay(source, 1.0, pseudo), **given, config=config, verbose=False
    )


class TestWhatIsReplayed:
    def test_no_material_is_both_replayed_and_in_the_ledger(self):
        structures = alloys(30)
        for number, atoms in enumerate(structures):
            atoms.info["material_id"] = f"m{number // 3}"
        two, ledger = joined(structures)
        replayed, aside = ({a.info["material_id"] for a in some} for some in (_old(two), ledger.structures))
        assert replayed | aside == {f"m{k}" for k in range(10)} and not replayed & aside
        assert len(ledger.structures) == 3
        assert ledger.said["from"] == "3 of 30 structures, set aside"

    def test_copies_of_a_structure_are_on_one_side_too(self, few):
        structures = turned_round(6, seed=3)
        for number, atoms in enumerate(structures):
            atoms.info["material_id"] = f"m{number}"
        two, ledger = joined("generated", structures)
        replayed, aside = ({a.info["material_id"] for a in some} for some in (_old(two), ledger.structures))
        assert replayed | aside == {f"m{k}" for k in range(6)} and aside and not replayed & aside
        assert ledger.said["from"] == f"copies of {len(aside)} of 6 structures, set aside"

    def test_what_matches_held_out_or_ledger_structures_is_left_out(self):
        structures = alloys(12)
        for number, atoms in enumerate(structures):
            atoms.info["material_id"] = f"m{number}"
        two, ledger = joined(structures, held_out=structures[:2], ledger=structures[4:6])
        assert ledger is None  # it is the caller's
        left = {atoms.info["material_id"] for atoms in _old(two)}
        assert not left & {"m0", "m1", "m4", "m5"} and {"m3", "m11"} <= left
        with pytest.raises(tm.InputError, match=r"replay: every structure .* is also held out"):
            joined(structures, held_out=structures)

    def test_both_tasks_are_visited_about_as_often(self):
        two, _ = joined(alloys(40))
        parts = [atoms.info["part"] for atoms in two.train]
        assert 0.7 < parts.count("new") / parts.count("base") < 1.4
        assert {atoms.info["part"] for atoms in two.valid} <= {"new"}

    def test_pseudo_labels_are_the_bases_whatever_the_data_say(self):
        structures = turned_round(8, seed=5)  # with labels of another kind
        two, ledger = joined(structures, pseudo=True)
        for atoms in _old(two):
            bare = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
            bare.calc = tm.Calculator(potential(), device="cpu")
            assert atoms.info["energy"] == pytest.approx(bare.get_potential_energy(), abs=1e-4)
            assert atoms.arrays["forces"] == pytest.approx(bare.get_forces(), abs=1e-4)
        assert ledger.before["forces"]["mae"] < 1e-5 and ledger.said["labels"] == "base"

    def test_structures_with_elements_that_the_base_never_saw_get_no_labels_from_it(self):
        structures = turned_round(8, seed=5)
        for atoms in structures[:3]:
            atoms.numbers[0] = 47
        two, _ = joined(structures, pseudo=True, ledger=alloys(3, seed=20))
        assert len({atoms.positions.tobytes() for atoms in _old(two)}) <= 5
        assert all(47 not in atoms.numbers for atoms in _old(two))
        with pytest.raises(tm.InputError, match="the base has not seen all elements of any structure"):
            joined(structures[:3], pseudo=True)

    def test_a_quantity_that_the_replayed_structures_lack_is_left_out(self):
        two, ledger = joined(without(alloys(12), "stress"))
        assert two.objective.parts["base"].stress == 0.0 and two.objective.parts["base"].forces > 0
        assert set(ledger.before) == {"energy_per_atom", "forces"}

    def test_generated_structures_are_copies_rattled_and_strained(self):
        structures = alloys(10)
        copies = generated(structures, seed=0)
        assert len(copies) == 200 and all(atoms.calc is None and "gap" not in atoms.info for atoms in copies)
        for atoms, original in zip(copies, structures, strict=False):  # first as they are
            assert np.array_equal(atoms.positions, original.positions) and np.array_equal(atoms.cell, original.cell)
        moved = [np.abs(a.get_scaled_positions(wrap=False) - structures[k // 19].get_scaled_positions(wrap=False))
                 for k, a in enumerate(copies[10:])]  # fmt: skip
        sizes = 3.9 * np.sqrt([np.mean(d**2) for d in moved])
        assert 0.003 < sizes.min() < 0.03 and 0.07 < sizes.max() < 0.2
        strains = [np.linalg.inv(structures[k // 19].cell.array) @ a.cell.array - np.eye(3)
                   for k, a in enumerate(copies[10:])]  # fmt: skip
        assert np.std(strains) == pytest.approx(
            0.02 * np.sqrt(2 / 3), rel=0.15
        )  # off the diagonal they are means of two
        assert all(
            np.array_equal(a.positions, b.positions) for a, b in zip(copies, generated(structures, 0), strict=True)
        )
        assert not np.array_equal(copies[10].positions, generated(structures, 1)[10].positions)

    def test_molecules_are_rattled_only_and_many_structures_are_thinned(self):
        molecule = ase.Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])
        copies = generated([molecule], seed=0)
        assert len(copies) == 200 and all(not atoms.cell.any() for atoms in copies)
        assert len(generated([molecule] * 1000, seed=0)) == 2000


def _old(two) -> list[ase.Atoms]:
    return [atoms for atoms in two.train if atoms.info["part"] == "base"]


class TestLedger:
    ledger = functools.cached_property(lambda self: alloys(6, seed=9))

    @pytest.mark.parametrize("strategy", ["aligned", "zero-shot"])
    def test_a_shift_of_references_is_not_forgetting(self, strategy):
        model = short(strategy=strategy, steps=None, lr=TrainConfig.lr, ledger=self.ledger)
        for found in forgotten(model).values():
            assert found["after"] == found["before"]
        shifts = model.card["history"][-1]["alignment"].get("reference shift (eV)", {})
        assert (max(map(abs, shifts.values()), default=0) > 1) == (strategy == "aligned")

    def test_errors_are_those_of_the_base_and_of_what_became_of_it(self):
        model = short(strategy="full", steps=10, lr=0.01, ledger=self.ledger)
        for when, one in (("before", potential()), ("after", model)):
            expected = tm.evaluate(one, self.ledger, verbose=False)
            assert forgotten(model)["forces"][when] == pytest.approx(expected["forces"]["mae"], rel=1e-5)
        assert forgotten(model)["forces"]["before"] != forgotten(model)["forces"]["after"]
        shifted = tm.evaluate(model, self.ledger, verbose=False)["energy_per_atom"]["mae"]
        assert (
            forgotten(model)["energy_per_atom"]["after"] < 0.5 * shifted
        )  # which has the references of the new labels

    @pytest.mark.parametrize("objective", [tm.MaskAtoms(), tm.MaskPositions(), tm.MaskElements(), tm.Denoise()])
    def test_a_base_of_any_objective_has_one(self, objective):
        water = [waters(4, seed) for seed in range(8)]
        start = tm.pretrain(water, objective, painn(cutoff=3.0), steps=2, **QUICK)
        for atoms in water:
            atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)))
        tuned = tm.finetune(start, water, tm.Potential(stress=0.0), steps=2, ledger=water, **QUICK)
        assert all(np.isfinite([found["before"], found["after"]]).all() for found in forgotten(tuned).values())
        assert forgotten(tuned)

    def test_of_a_new_property_the_bases_readout_on_the_new_backbone_is_judged(self):
        structures = alloys(8, seed=2)
        options = {"objective": tm.Property("gap"), "structures": structures, "ledger": self.ledger, "lr": 0.01}
        full = short(strategy="full", steps=10, **options)
        assert forgotten(full)["forces"]["after"] != forgotten(full)["forces"]["before"]
        probe = short(strategy="probe", **{**options, "steps": None, "lr": 2e-3})
        assert forgotten(probe)["forces"]["after"] == forgotten(probe)["forces"]["before"]

    def test_other_strategies_have_it_too(self):
        for strategy, options in (("lora", {"rank": 2}), ("head", {})):
            model = short(strategy=strategy, steps=5, lr=0.05, ledger=self.ledger, dtype="float64", **options)
            assert forgotten(model)["forces"]["after"] != forgotten(model)["forces"]["before"]

    def test_without_one_nothing_is_said(self):
        assert "forgetting" not in short(strategy="full").card["history"][-1]

    def test_labels_are_found_as_in_the_training_of_the_base(self):
        def renamed(structures):
            for atoms in structures:
                atoms.info["total"] = atoms.get_potential_energy() * 1000
                atoms.calc = None
            return structures

        options = {"label": {"energy": "total"}, "unit": {"energy": "meV"}}
        start = tm.pretrain(renamed(alloys(12)), tm.Potential(), painn(), steps=20, lr=0.01, **options, **QUICK)
        model = short(start=start, ledger=renamed(alloys(6, seed=9)), replay=renamed(alloys(12)))
        expected = tm.evaluate(start, renamed(alloys(6, seed=9)), verbose=False)["energy_per_atom"]["mae"]
        assert forgotten(model)["energy_per_atom"]["before"] == pytest.approx(expected, rel=1e-5) and expected < 1

    def test_tables_are_for_people(self):
        entry = short(ledger=self.ledger, replay=alloys(8)).card["history"][-1]["forgetting"]
        rows = {row["quantity"]: row for row in forgetting(entry)}
        assert rows["energy per atom"]["unit"] == "meV/atom" and rows["stress"]["unit"] == "GPa"
        before = entry["errors"]["forces"]["before"]
        assert float(rows["forces"]["before"]) == pytest.approx(1000 * before, rel=1e-3)
        assert entry["structures"] == 6 and entry["from"] == "given"

    def test_what_cannot_be_judged_is_refused(self):
        bare = without(alloys(3), "energy", "forces", "stress")
        with pytest.raises(tm.InputError, match="ledger: no structure has energy or forces or stress"):
            short(strategy="full", ledger=bare)
        levels = tm.Fidelities(tm.Potential(), ["a", "b"])
        with pytest.raises(tm.InputError, match="a ledger judges models that are told structures alone"):
            short(strategy="full", objective=levels, structures={"a": alloys(3), "b": alloys(3)}, ledger=self.ledger)


def test_the_command_line_has_all_of_it(tmp_path, capsys):
    potential().save(tmp_path / "base.safetensors")
    for name, structures in (("new", turned_round(8, seed=3)), ("old", alloys(12)), ("ledger", alloys(4, seed=9))):
        ase.io.write(tmp_path / f"{name}.extxyz", structures)
    start, new, ledger = (str(tmp_path / name) for name in ("base.safetensors", "new.extxyz", "ledger.extxyz"))
    common = ["finetune", start, new, "--objective", "Potential", "--steps", "2", "--edges", "400"]
    common += ["--split-by", "random", "--ledger", ledger]
    cli.main([*common, "--strategy", "lora", "--rank", "2", "--out", str(tmp_path / "lora")])
    replay = ["--strategy", "replay", "--replay", str(tmp_path / "old.extxyz"), "--pseudo", "--replay-weight", "0.5"]
    cli.main([*common, *replay, "--out", str(tmp_path / "replay")])
    shown = " ".join(capsys.readouterr().err.split())
    assert "LoRA: updates of rank 2" in shown and "Errors on the base's own task, on 4 structures (given)" in shown
    stages = {name: tm.load(tmp_path / name).card["history"][-1] for name in ("lora", "replay")}
    assert stages["lora"]["lora"]["rank"] == 2 and stages["lora"]["forgetting"]["structures"] == 4
    assert stages["replay"]["replay"]["weight"] == 0.5 and stages["replay"]["replay"]["labels"] == "base"
    page = run_report(tmp_path / "replay").read_text()
    assert "What the base forgot" in page and "labelled by the base itself" in page
    assert "updates of rank 2" in run_report(tmp_path / "lora").read_text()
    with pytest.raises(SystemExit):
        cli.main([*common, "--rank", "2", "--out", str(tmp_path / "wrong")])
    assert "rank is for strategy 'lora', but the strategy is 'full'" in " ".join(capsys.readouterr().err.split())
