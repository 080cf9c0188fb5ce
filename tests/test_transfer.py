"""Pre-training, transfer and alignment: what is kept, what is new, and what zero steps change."""

from __future__ import annotations

import json
import re

import ase
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Hartree

import transfermium as tm
from tests.alloys import QUICK, alloys, gap_model, painn, potential, same_bits, weights_of, without
from transfermium.data import Split
from transfermium.report import run_report

ELEMENTS = ("Cu", "Au")


class TestPretrain:
    def test_the_same_seed_gives_the_same_model(self):
        first, second, other = (pretrained(seed=seed, steps=3) for seed in (0, 0, 1))
        assert same_bits(weights_of(first), weights_of(second))
        assert not same_bits(weights_of(first), weights_of(other))

    def test_the_callers_random_numbers_do_not_matter_and_are_left_alone(self):
        models = []
        for seed in (5, 6):
            backbone = painn()
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            models.append(tm.pretrain(alloys(4), tm.Denoise(0.1), backbone, steps=2, **QUICK))
            assert torch.equal(before, torch.get_rng_state())
        assert same_bits(*(weights_of(model) for model in models))

    def test_the_given_backbone_and_structures_are_left_as_they_are(self):
        backbone, structures = painn(), alloys(6)
        before, info = {n: t.clone() for n, t in backbone.state_dict().items()}, [dict(a.info) for a in structures]
        tm.pretrain(structures, tm.Potential(), backbone, steps=2, **QUICK)
        assert same_bits(before, backbone.state_dict())
        assert [a.info for a in structures] == info and [a.positions.tobytes() for a in structures] == [
            a.positions.tobytes() for a in alloys(6)
        ]

    def test_the_backbone_is_tensornet_unless_said_otherwise(self):
        model = tm.pretrain(alloys(3), tm.Potential(), steps=0, **QUICK)
        assert isinstance(model.backbone, tm.TensorNet) and model.backbone.width == 64

    def test_training_helps(self):
        held_out = alloys(8, seed=1)
        before, after = (tm.evaluate(m, held_out, verbose=False) for m in (pretrained(steps=0), pretrained(steps=80)))
        assert after["forces"]["mae"] < 0.5 * before["forces"]["mae"]

    def test_isolated_atoms_are_references_and_not_trained_on(self):
        model = tm.pretrain([*alloys(6), *lone_atoms()], tm.Potential(), painn(), steps=1, valid_fraction=0, **QUICK)
        assert model.card["references (eV)"] == {"Cu": -3.5, "Au": -4.25}
        assert model.card["history"][-1]["structures"] == 6
        assert model.card["elements"]["Au"] == 1 + sum((atoms.numbers == 79).sum() for atoms in alloys(6))

    def test_only_isolated_atoms_are_nothing_to_train_on(self):
        with pytest.raises(tm.InputError, match="isolated atoms"):
            tm.pretrain(lone_atoms(), tm.Potential(), painn(), **QUICK)

    def test_what_half_of_the_structures_lack_is_masked(self):
        structures = alloys(8)
        structures[4:] = without(structures[4:], "forces")
        model = tm.pretrain(structures, tm.Potential(), painn(), steps=3, valid_fraction=0, **QUICK)

        assert all(torch.isfinite(t).all() for t in weights_of(model).values())
        forces = np.concatenate([atoms.get_forces() for atoms in structures[:4]])
        weight = model.card["objective"]["arguments"]["forces"]
        assert weight == pytest.approx(1 / np.sqrt(np.mean(forces**2)))
        result = tm.evaluate(model, structures, verbose=False)
        assert (result["forces"]["n"], result["energy_per_atom"]["n"], result["n"]) == (16, 8, 8)

    def test_a_label_that_nobody_has_is_left_out(self):
        model = tm.pretrain(without(alloys(4), "stress"), tm.Potential(), painn(), steps=1, **QUICK)
        assert model.card["objective"]["arguments"]["stress"] == 0.0
        assert [entry["quantity"] for entry in model.card["labels"]["labels"]] == ["energy", "forces"]

    def test_a_label_that_was_asked_for_must_be_there(self):
        with pytest.raises(tm.InputError, match="no structure has 'stress'"):
            tm.pretrain(without(alloys(4), "stress"), tm.Potential(stress=1.0), painn(), **QUICK)

    def test_a_misspelt_label_is_told_what_there_is(self):
        with pytest.raises(tm.InputError, match=r"no structure has 'gpa'; .*forces.* did you mean gap\?"):
            tm.pretrain(alloys(4), tm.Property("gpa"), painn(), **QUICK)

    @pytest.mark.parametrize("option", [{"label": {"enrgy": "e"}}, {"unit": {"charge": "e"}}], ids=str)
    def test_an_option_for_a_label_that_is_not_wanted_is_refused(self, option):
        with pytest.raises(tm.InputError, match="is not a label of this objective, which has energy, forces, stress"):
            tm.pretrain(alloys(4), tm.Potential(), painn(), **option, **QUICK)

    def test_keys_and_units_can_be_named(self):
        structures = without(alloys(6), "energy", "stress")
        for atoms, original in zip(structures, alloys(6), strict=True):
            atoms.info["total"] = original.get_potential_energy() / Hartree
        named = {"label": {"energy": "total"}, "unit": {"energy": "hartree"}}
        model = tm.pretrain(structures, tm.Potential(), painn(), steps=0, **named, **QUICK)

        expected = tm.pretrain(without(alloys(6), "stress"), tm.Potential(), painn(), steps=0, **QUICK)
        assert model.card["references (eV)"] == pytest.approx(expected.card["references (eV)"])
        assert model.card["quantities"]["energy"] == ["energy", "eV"]
        result = tm.evaluate(model, structures, verbose=False, **named)
        assert result["energy_per_atom"]["mae"] == pytest.approx(
            tm.evaluate(expected, alloys(6), verbose=False)["energy_per_atom"]["mae"]
        )

    def test_validation_structures_can_be_given(self):
        model = tm.pretrain(alloys(4), tm.Potential(), painn(), valid=alloys(3, seed=1), steps=2, verbose=False)
        assert model.card["history"][-1]["structures"] == 4
        assert model.card["history"][-1]["validation structures"] == 3

    def test_validation_structures_without_labels_are_refused(self):
        bare = without(alloys(3, seed=1), "energy", "forces", "stress")
        with pytest.raises(tm.InputError, match="validation"):
            tm.pretrain(alloys(4), tm.Potential(), painn(), valid=bare, steps=2, verbose=False)

    def test_a_split_key_is_followed(self):
        structures = alloys(8)
        for index, atoms in enumerate(structures):
            atoms.info["split"] = ["train", "val", "test", "train"][index % 4]
        model = tm.pretrain(structures, tm.Potential(), painn(), split_key="split", steps=1, **QUICK)
        assert model.card["history"][-1]["structures"] == 4
        assert model.card["history"][-1]["validation structures"] == 2

    def test_a_fold_can_be_held_out(self):
        structures = alloys(8)
        for index, atoms in enumerate(structures):
            atoms.info["fold"] = index % 4
        model = tm.pretrain(structures, tm.Potential(), painn(), split_key="fold=1", steps=1, **QUICK)
        stage = model.card["history"][-1]
        assert stage["validation structures"] >= 1
        assert stage["structures"] + stage["validation structures"] == 6

    def test_the_split_of_an_earlier_run_can_be_used_again(self, tmp_path):
        structures = [*lone_atoms(), *alloys(8)]
        options = {"steps": 1, **QUICK}
        tm.pretrain(structures, tm.Potential(), painn(), seed=3, out=tmp_path / "first", **options)
        options["split_by"] = str(tmp_path / "first" / "split.json")
        tm.pretrain(structures, tm.Potential(), painn(), seed=4, out=tmp_path / "second", **options)
        first, second = (Split.load(tmp_path / name / "split.json") for name in ("first", "second"))
        assert second.train.tolist() == first.train.tolist() and second.valid.tolist() == first.valid.tolist()
        assert 0 not in first.valid and 1 not in first.valid  # the isolated atoms

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"valid_fraction": 1.0}, "valid_fraction is 1.0"),
            ({"stpes": 3}, "stpes"),
            ({"lr": 0.0}, "lr is 0.0"),
            ({"split_key": "fold"}, "'fold'"),
        ],
        ids=str,
    )
    def test_a_wrong_option_is_named(self, wrong, words):
        with pytest.raises(tm.InputError, match=words):
            tm.pretrain(alloys(4), tm.Potential(), painn(), **wrong, **QUICK)


class TestCard:
    def test_it_says_what_the_model_is(self):
        card = potential().card
        assert card["quantities"] == {
            "energy": ["energy", "eV"],
            "forces": ["forces", "eV/Å"],
            "stress": ["stress", "eV/Å^3"],
        }
        stage = card["history"][-1]
        shown = {name: stage[name] for name in ("verb", "steps", "structures", "validation structures")}
        assert shown == {"verb": "pretrain", "steps": 20, "structures": 14, "validation structures": 2}
        assert set(card["elements"]) == set(ELEMENTS)
        assert card["metrics"]["validation"]["forces"]["unit"] == "eV/Å"

    def test_it_is_json_and_survives_the_file(self, tmp_path):
        potential().save(tmp_path / "model.safetensors")
        assert tm.load(tmp_path / "model.safetensors").card == json.loads(json.dumps(potential().card))

    def test_history_and_elements_add_up(self):
        others = alloys(4)
        for atoms in others:
            atoms.numbers[atoms.numbers == 79] = 47
        model = tuned(potential(), tm.Potential(), structures=others, steps=1)
        assert [stage["verb"] for stage in model.card["history"]] == ["pretrain", "finetune"]
        assert set(model.card["elements"]) == {"Au", "Cu", "Ag"}
        assert model.card["elements in last stage"] == ["Ag", "Cu"]

    def test_a_run_folder_has_everything(self, tmp_path):
        model = tm.pretrain(alloys(6), tm.Potential(), painn(), steps=2, out=tmp_path / "run", **QUICK)
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert names >= {
            "config.json", "labels.json", "split.json", "metrics.jsonl", "metrics.csv", "model.safetensors",
            "validation.json",
        }  # fmt: skip
        parity = json.loads((tmp_path / "run" / "validation.json").read_text())["parity"]
        assert set(parity) == {"energy_per_atom", "forces", "stress"}
        assert same_bits(weights_of(tm.load(tmp_path / "run" / "model.safetensors")), weights_of(model))


class TestZeroSteps:
    """A transferred model with zero training steps equals its base, apart from the reported reference shift."""

    @pytest.mark.parametrize("shift", [0.0, 7.5])
    def test_energies_differ_by_the_reported_shifts_and_forces_not_at_all(self, shift):
        base, structures = potential(), shifted(alloys(10), {29: shift, 79: -2 * shift})
        model = tuned(base, tm.Potential(), structures=structures, steps=0)

        shifts = model.card["history"][-1]["alignment"]["reference shift (eV)"]
        assert set(shifts) == set(ELEMENTS)
        for before, after in zip(predictions(base, structures), predictions(model, structures), strict=True):
            expected = sum(shifts[symbol] for symbol in before.symbols)
            assert after.get_potential_energy() - before.get_potential_energy() == pytest.approx(expected, abs=1e-9)
            assert np.array_equal(after.get_forces(), before.get_forces())
            assert np.array_equal(after.get_stress(), before.get_stress())
        assert shifts["Cu"] - shifts["Au"] == pytest.approx(3 * shift, abs=0.5)

    @pytest.mark.parametrize("strategy", ["zero-shot", "aligned", "probe"])
    @pytest.mark.parametrize("name", ["lr", "layer_decay", "l2_to_base"])
    def test_options_of_training_are_refused_where_nothing_is_trained(self, strategy, name):
        with pytest.raises(tm.InputError, match=f"'{strategy}' does no step of training, so {name}=0.5 would change"):
            tuned(gap_model(), tm.Property("gap"), strategy=strategy, **{name: 0.5})

    @pytest.mark.parametrize("base", [potential, gap_model])
    def test_without_alignment_every_bit_is_the_same(self, base):
        objective = tm.Potential() if base is potential else tm.Property("gap")
        model = tuned(base(), objective, steps=0, align=False)
        assert same_bits(weights_of(model), weights_of(base()))
        assert "reference shift (eV)" not in model.card["history"][-1]["alignment"]

    def test_a_property_is_shifted_by_its_mean_residual(self):
        structures = alloys(8, seed=2)
        for atoms in structures:
            atoms.info["gap"] += 3.0
        base = gap_model()
        model = tuned(base, tm.Property("gap"), structures=structures, steps=0, valid_fraction=0)

        before, after, labels = (
            np.array([atoms.info["gap"] for atoms in sources])
            for sources in (predictions(base, structures), predictions(model, structures), structures)
        )
        assert after - before == pytest.approx(np.full(8, np.mean(labels - before)))
        assert model.card["history"][-1]["alignment"]["shift"]["gap"] == pytest.approx(np.mean(labels - before))

    def test_the_precision_of_the_base_is_kept(self):
        base = tm.pretrain(alloys(6), tm.Potential(), painn(), steps=1, dtype="float64", **QUICK)
        assert same_bits(weights_of(tuned(base, tm.Potential(), steps=0, align=False)), weights_of(base))

    def test_the_base_itself_is_left_as_it_is(self):
        base = potential()
        before, card = weights_of(base), json.dumps(base.card)
        tuned(base, tm.Potential(), steps=3, backbone_lr=0.0)
        assert same_bits(before, weights_of(base)) and json.dumps(base.card) == card
        assert all(p.requires_grad for p in base.parameters())


class TestFinetune:
    def test_a_model_worse_than_its_aligned_base_is_never_returned(self):
        aligned, ruined = (tuned(potential(), tm.Potential(), steps=steps, lr=10.0) for steps in (0, 3))
        assert same_bits(weights_of(aligned), weights_of(ruined))

    @pytest.mark.parametrize("lr", [1e-3, 0.1, 0.5])
    def test_validation_never_gets_worse(self, lr, tmp_path):
        def best(steps):
            model = tuned(potential(), tm.Potential(), steps=steps, lr=lr, out=tmp_path / str(steps))
            return model.card["history"][-1]["best validation loss"]

        assert best(steps=8) <= best(steps=0)

    def test_a_file_is_a_base(self, tmp_path):
        potential().save(tmp_path / "base.safetensors")
        from_file = tuned(tmp_path / "base.safetensors", tm.Potential(), steps=2)
        assert same_bits(weights_of(from_file), weights_of(tuned(potential(), tm.Potential(), steps=2)))

    def test_a_frozen_backbone_keeps_its_bits(self):
        model = tuned(potential(), tm.Potential(), steps=4, backbone_lr=0.0, valid_fraction=0)
        assert same_bits(weights_of(model, "backbone."), weights_of(potential(), "backbone."))
        assert not same_bits(weights_of(model, "heads."), weights_of(potential(), "heads."))
        assert all(p.grad is None for p in model.backbone.parameters())

    def test_what_was_frozen_can_be_trained_again(self):
        frozen = tuned(potential(), tm.Potential(), steps=1, backbone_lr=0.0)
        model = tuned(frozen, tm.Potential(), steps=4, valid_fraction=0)
        assert not same_bits(weights_of(model, "backbone."), weights_of(frozen, "backbone."))

    def test_another_property_gets_a_new_head_on_the_same_backbone(self):
        model = tuned(potential(), tm.Property("gap"), steps=0)
        assert list(model.outputs) == ["gap"]
        assert model.card["history"][-1]["alignment"]["kept heads"] == []
        assert same_bits(weights_of(model, "backbone."), weights_of(potential(), "backbone."))
        gaps = [atoms.info["gap"] for atoms in alloys(8)]
        assert min(gaps) < float(model.heads["gap"].shift) < max(gaps)

    def test_a_head_of_other_arguments_is_new(self):
        model = tuned(gap_model(), tm.Property("gap", kind="extensive"), steps=0)
        assert model.card["history"][-1]["alignment"]["kept heads"] == []

    def test_sums_move_element_by_element(self, capsys):
        """As between two methods, whose atomization energies differ by something for each element."""
        cheap, dear = alloys(24, seed=1), alloys(24, seed=2)
        for atoms in cheap:
            atoms.info["ae"] = 2.0 * atoms.symbols.count("Cu") + 3.0 * atoms.symbols.count("Au")
        for atoms in dear:
            atoms.info["ae"] = 2.5 * atoms.symbols.count("Cu") + 1.0 * atoms.symbols.count("Au")
        objective = tm.Property("ae", "extensive")
        base = tm.pretrain(cheap, objective, painn(), steps=40, lr=0.01, **QUICK)
        model = tm.finetune(base, dear, objective, strategy="aligned", **{**QUICK, "verbose": True})
        alignment = model.card["history"][-1]["alignment"]
        assert alignment["shift per element"]["ae"] == pytest.approx({"Cu": 0.5, "Au": -2.0}, abs=0.1)
        assert alignment["residual"]["ae"]["after"] < 0.05 * alignment["residual"]["ae"]["before"]
        assert re.search(
            r"'ae' was shifted by .* per atom on average \(Cu \+0\.\d+, Au -[12]\.\d+\)",
            " ".join(capsys.readouterr().err.split()),
        )
        unseen = ase.Atoms("NiCu", positions=[[0, 0, 0], [0, 0, 2.5]], cell=[4, 4, 5], pbc=True)
        moved = [tm.predict(m, [unseen], verbose=False)[0].info["ae"] for m in (base, model)]
        assert moved[1] - moved[0] == pytest.approx(0.5 + alignment["shift"]["ae"], abs=0.2)

    @pytest.mark.parametrize("conservative", [True, False], ids=["conservative", "direct"])
    def test_a_head_that_knew_noise_is_kept_and_scaled_to_forces(self, conservative):
        structures = alloys(10)
        objective = tm.Denoise(0.1, conservative)
        base = tm.pretrain(structures, objective, painn(), steps=60, lr=0.01, **QUICK)
        model = tuned(base, tm.Potential(conservative=conservative), structures=structures, steps=0, valid_fraction=0)

        head = "energy" if conservative else "forces"
        report = model.card["history"][-1]["alignment"]
        assert report["kept heads"] == [head]
        factor = report["scale"][head]
        assert float(model.heads[head].scale) == pytest.approx(factor * float(base.heads[head].scale))
        for name, t in weights_of(base, f"heads.{head}.readout" if conservative else f"heads.{head}.mix").items():
            assert torch.equal(t, weights_of(model)[name])

        displacement = np.concatenate([a.arrays["denoising_displacement"] for a in predictions(base, structures)])
        forces = np.concatenate([a.get_forces() for a in predictions(model, structures)])
        labels = np.concatenate([a.get_forces() for a in structures])
        assert forces == pytest.approx(factor * displacement, rel=1e-4, abs=1e-5)
        slope = (labels * displacement).mean() / (displacement**2).mean()
        assert factor == pytest.approx(
            max(slope, 0.1 * np.sqrt((labels**2).mean() / (displacement**2).mean())), rel=1e-3
        )

    def test_a_direct_potential_becomes_conservative(self):
        base = tm.pretrain(alloys(8), tm.Potential(conservative=False), painn(), steps=2, **QUICK)
        assert set(base.heads) == {"energy", "forces", "stress"}
        model = tuned(base, tm.Potential(), steps=0)
        assert model.derivatives == {"forces": tm.Gradient("energy"), "stress": tm.Strain("energy")}
        report = model.card["history"][-1]["alignment"]
        assert report["kept heads"] == ["energy"] and "scale" not in report

    def test_a_backbone_without_vectors_keeps_its_bond_vectors(self):
        backbone = tm.CGCNN(width=8, cutoff=4.0, depth=1)
        base = tm.pretrain(alloys(8), tm.Denoise(0.1, conservative=False), backbone, steps=2, **QUICK)
        model = tuned(base, tm.Potential(conservative=False), steps=0)
        assert weights_of(base, "bond_vectors.")
        assert same_bits(weights_of(model, "bond_vectors."), weights_of(base, "bond_vectors."))

    def test_elements_that_cannot_be_told_apart_are_said_to_be_so(self):
        structures = [alloys(1)[0] for _ in range(4)]
        for k, atoms in enumerate(structures):
            atoms.positions[0, 0] += 0.01 * k
        model = tuned(potential(), tm.Potential(), structures=structures, steps=0)
        assert model.card["history"][-1]["alignment"]["elements told apart"] == "1 of 2"


class TestFolder:
    def test_a_finished_run_returns_its_model(self, tmp_path):
        first = tuned(potential(), tm.Potential(), steps=3, out=tmp_path)
        metrics = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
        again = tuned(potential(), tm.Potential(), steps=3, out=tmp_path)
        assert same_bits(weights_of(first), weights_of(again))
        assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == metrics

    def test_a_run_killed_before_its_model_was_written_says_the_same_of_itself(self, tmp_path, monkeypatch):
        expected = tuned(potential(), tm.Potential(), steps=3).card

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tm.Model, "save", interrupt)
            tuned(potential(), tm.Potential(), steps=3, out=tmp_path)
        card = tuned(potential(), tm.Potential(), steps=3, out=tmp_path).card
        for stage in (expected["history"][-1], card["history"][-1]):
            assert stage.pop("seconds") >= 0 and stage.pop("processor seconds") >= 0
        assert card == expected

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"steps": 4}, r"train\.steps was 3 there and is 4 now"),
            ({"align": False}, "align was true there and is false now"),
            ({"structures": alloys(9)}, "data was"),
            ({"base": gap_model}, r"base\..* was"),
            ({"objective": tm.Potential(forces=2.0)}, r"objective\.arguments\.forces was null there and is 2.0 now"),
            ({"valid_fraction": 0.3}, r"valid\.fraction was 0.1 there and is 0.3 now"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_another_call_is_refused_with_the_name_of_the_difference(self, tmp_path, change, words):
        if "base" in change:
            change = {"base": change["base"]()}
        asked = {"base": potential(), "objective": tm.Potential(), "steps": 3}
        tuned(**asked, out=tmp_path)
        with pytest.raises(tm.InputError, match=words):
            tuned(**{**asked, **change}, out=tmp_path)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def pretrained(seed: int = 0, **options) -> tm.Model:
    return tm.pretrain(alloys(16), tm.Potential(), painn(), seed=seed, lr=0.01, **options, **QUICK)


def tuned(base, objective, *, structures=None, **options) -> tm.Model:
    return tm.finetune(base, alloys(8) if structures is None else structures, objective, **options, **QUICK)


def predictions(model: tm.Model, structures) -> list[ase.Atoms]:
    return tm.predict(model, structures, verbose=False)


def shifted(structures: list[ase.Atoms], shifts: dict[int, float]) -> list[ase.Atoms]:
    """The same at another level of theory, which differs by a constant per element."""
    for atoms in structures:
        atoms.calc.results["energy"] += sum(shifts[z] for z in atoms.numbers)
    return structures


def lone_atoms() -> list[ase.Atoms]:
    atoms = [ase.Atoms(symbol, info={"config_type": "IsolatedAtom"}) for symbol in ELEMENTS]
    for lone, energy in zip(atoms, (-3.5, -4.25), strict=True):
        lone.calc = SinglePointCalculator(lone, energy=energy)
    return atoms


class TestWhatAnalysisFound:
    """Laws that were broken once."""

    def test_isolated_atoms_do_not_spoil_the_alignment(self):
        structures = alloys(12)
        base = tm.pretrain(structures, tm.Potential(), painn(), steps=60, lr=0.01, **QUICK)
        lone = []
        for symbol in ("Cu", "Au"):
            atoms = ase.Atoms(symbol, info={"config_type": "IsolatedAtom"})
            atoms.calc = SinglePointCalculator(atoms, energy=7.0, forces=np.zeros((1, 3)))
            lone.append(atoms)
        without = tuned(base, tm.Potential(), structures=structures, steps=0, valid_fraction=0)
        among = tuned(base, tm.Potential(), structures=[*structures, *lone], steps=0, valid_fraction=0)
        assert torch.allclose(without.heads["energy"].references, among.heads["energy"].references)

    def test_validation_structures_and_a_split_are_not_asked_for_at_once(self):
        with pytest.raises(tm.InputError, match="leave out split_key"):
            tm.pretrain(alloys(4), tm.Potential(), painn(), valid=alloys(2), split_key="split", verbose=False)

    def test_every_element_gets_a_reference_however_few_structures_are_looked_at(self, monkeypatch):
        monkeypatch.setattr("transfermium.dataset.MOST_SAMPLES", 4)
        structures = [a for a in alloys(20) if True]
        rare = structures[7].copy()
        rare.numbers[:] = 47
        rare.calc = SinglePointCalculator(rare, energy=-60.0, forces=np.zeros((len(rare), 3)))
        structures[7] = rare
        model = tm.pretrain(structures, tm.Potential(), painn(), steps=0, valid_fraction=0, verbose=False)
        assert float(model.heads["energy"].references[47]) == pytest.approx(-60 / len(rare), abs=1e-2)

    def test_a_split_of_other_data_is_refused(self, tmp_path):
        tm.pretrain(alloys(8), tm.Potential(), painn(), steps=1, out=tmp_path / "a", verbose=False)
        with pytest.raises(tm.InputError, match="splits 8 structures, but there are 6"):
            again = str(tmp_path / "a/split.json")
            tm.pretrain(alloys(6), tm.Potential(), painn(), steps=1, split_by=again, verbose=False)

    def test_words_can_be_classes(self):
        structures = [a.copy() for a in alloys(12)]
        for i, atoms in enumerate(structures):
            atoms.calc = None
            atoms.info["kind"] = "metal" if i % 2 else "insulator"
        objective = tm.Property("kind", task="classification", classes=["insulator", "metal"])
        model = tm.pretrain(structures, objective, painn(), steps=2, verbose=False)
        assert {a.info["kind"] for a in tm.predict(model, structures, verbose=False)} <= {"insulator", "metal"}
        assert 0 <= tm.evaluate(model, structures, verbose=False)["kind"]["accuracy"] <= 1
        with pytest.raises(tm.InputError, match="name all classes"):
            tm.pretrain(structures, tm.Property("kind", task="classification"), painn(), steps=2, verbose=False)


class TestTogether:
    """Two levels of theory, or a property beside a force field, in one run."""

    def levels(self):
        pbe, scan = alloys(10), alloys(10)
        for atoms in scan:
            atoms.calc = SinglePointCalculator(
                atoms, energy=atoms.get_potential_energy() - 7.0 * len(atoms), forces=atoms.get_forces()
            )
        return {"pbe": pbe, "scan": scan[:6]}

    def model(self, **options):
        objective = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()})
        return tm.pretrain(self.levels(), objective, painn(), **{"steps": 30, "lr": 0.01, **QUICK, **options})

    def test_each_level_has_its_own_references(self):
        model = self.model()
        atoms = alloys(1)[0]
        energies = [tm.Calculator(model, part=part).get_potential_energy(atoms) for part in ("pbe", "scan")]
        assert (energies[0] - energies[1]) / len(atoms) == pytest.approx(7.0, abs=0.5)

    def test_a_part_must_be_chosen_and_is_the_whole_in_use(self, tmp_path):
        self.model(out=tmp_path / "run")
        model = tm.load(tmp_path / "run/model.safetensors")
        scan = self.levels()["scan"]
        for use in (
            lambda: tm.Calculator(model),
            lambda: tm.evaluate(model, scan, verbose=False),
            lambda: tm.predict(model, scan, verbose=False),
            lambda: tm.finetune(model, scan, tm.Potential(), steps=5, **QUICK),
        ):
            with pytest.raises(tm.InputError, match=r"choose one with part .--part.: pbe or scan"):
                use()
        with pytest.raises(tm.InputError, match="no part 'b3lyp': it has pbe, scan"):
            tm.Calculator(model, part="b3lyp")
        errors = tm.evaluate(model, scan, part="scan", verbose=False)
        others = tm.evaluate(model, scan, part="pbe", verbose=False)
        assert errors["energy_per_atom"]["mae"] < 1 < 6 < others["energy_per_atom"]["mae"] < 8
        assert {"pbe energy_per_atom", "scan forces"} <= model.card["metrics"]["validation"].keys()
        predicted = tm.predict(model, scan, part="scan", verbose=False)
        tuned = tm.finetune(model, scan, tm.Potential(), part="scan", align=False, steps=0, **QUICK)
        for one, other in zip(predicted, tm.predict(tuned, scan, verbose=False), strict=True):
            assert one.get_potential_energy() == pytest.approx(other.get_potential_energy())

    def test_a_part_has_seen_its_own_elements_and_levels_of_theory(self):
        data = self.levels()
        for level, structures in data.items():
            for atoms in structures:
                atoms.info["level"] = level.upper()
        for atoms in data["scan"]:
            atoms.numbers[atoms.numbers == 79] = 47
        objective = tm.Together({level: tm.Potential() for level in data})
        model = tm.pretrain(data, objective, painn(), steps=1, **QUICK)
        assert set(model.card["elements"]) == {"Cu", "Ag", "Au"} and set(model.card["levels"]) == {"PBE", "SCAN"}
        for level, element in (("pbe", "Au"), ("scan", "Ag")):
            card = model.part(level).card
            assert set(card["elements"]) == {"Cu", element} and set(card["levels"]) == {level.upper()}
            assert set(card["metrics"]["validation"]) == {"energy_per_atom", "forces", "stress"} or level == "scan"
        silver = next(atoms for atoms in data["scan"] if 47 in atoms.numbers).copy()
        silver.calc = tm.Calculator(model, part="pbe")
        with pytest.raises(tm.InputError, match="Ag"):
            silver.get_potential_energy()

    def test_the_references_of_each_level_are_fitted_again_and_told_apart(self, tmp_path):
        base, moved = self.model(), self.levels()
        for atoms in moved["scan"]:
            atoms.calc.results["energy"] += 2.0 * len(atoms)
        objective = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()})
        tuned = tm.finetune(base, moved, objective, steps=0, out=tmp_path / "run", **QUICK)
        report = tuned.card["history"][-1]["alignment"]
        shifts = [np.mean(list(report[f"reference shift (eV) of {level}_energy"].values())) for level in moved]
        assert shifts[1] - shifts[0] == pytest.approx(2.0, abs=0.5)
        page = run_report(tmp_path / "run").read_text()
        assert all(f"Reference energies of {level}_energy were" in page for level in moved)

    def test_a_property_keeps_its_force_field(self):
        base = tm.pretrain(alloys(8), tm.Potential(), painn(), steps=20, **QUICK)
        gaps = alloys(8)
        for atoms in gaps:
            atoms.info["gap"] = float(atoms.get_volume()) / len(atoms)
            atoms.calc = None
        objective = tm.Together({"gap": tm.Property("gap"), "field": tm.Potential()}, {"field": 0.1})
        model = tm.finetune(base, {"gap": gaps, "field": alloys(8)}, objective, steps=5, **QUICK)
        assert set(model.outputs) == {"gap", "energy", "forces", "stress"}
        assert model.card["history"][-1]["alignment"]["kept heads"] == ["energy"]
        errors = tm.evaluate(model, gaps, verbose=False)
        assert "gap" in errors
        assert tm.Calculator(model).get_potential_energy(alloys(1)[0]) < 1e3

    def test_kept_heads_of_parts_are_aligned(self):
        model = self.model()
        levels = self.levels()
        for atoms in levels["scan"]:
            atoms.calc.results["energy"] += 2.0 * len(atoms)
        objective = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()})
        base = model
        base.card.pop("parts")  # all of it is the base
        moved = tm.finetune(base, levels, objective, steps=0, **QUICK)
        shift = moved.heads["scan_energy"].references - model.heads["scan_energy"].references
        present = sorted(set(levels["scan"][0].numbers))
        assert shift[present].mean() == pytest.approx(2.0, abs=0.3)

    def test_names_that_are_no_parts_are_refused(self):
        objective = tm.Together({"a": tm.Potential(), "b": tm.Potential()})
        with pytest.raises(tm.InputError, match="'c' is not a part of this objective, which has a, b"):
            tm.pretrain({"c": alloys(3)}, objective, painn(), steps=5, **QUICK)
        with pytest.raises(tm.InputError, match="only Together has parts"):
            tm.pretrain({"a": alloys(3)}, tm.Potential(), painn(), steps=5, **QUICK)

    def test_runs_resume_and_finish(self, tmp_path):
        once = self.model(out=tmp_path / "a")
        again = self.model(out=tmp_path / "a")
        for name, value in once.state_dict().items():
            assert torch.equal(value, again.state_dict()[name])


def test_a_model_that_was_told_forces_can_do_without(tmp_path):
    base = tm.pretrain(alloys(8), tm.Denoise(told_forces=True), painn(), steps=20, **QUICK)
    assert base.backbone.vector_inputs == ("forces",)
    model = tm.finetune(base, alloys(8), tm.Potential(), out=tmp_path / "run", steps=5, **QUICK)
    atoms = alloys(1)[0]
    assert tm.Calculator(tmp_path / "run/model.safetensors").get_potential_energy(atoms) == pytest.approx(
        tm.Calculator(model).get_potential_energy(atoms)
    )


def test_an_existing_model_can_be_told_forces():
    base = tm.pretrain(alloys(8), tm.Potential(), painn(), steps=5, **QUICK)
    model = tm.finetune(base, alloys(8), tm.Denoise(told_forces=True), steps=5, **QUICK)
    assert model.backbone.vector_inputs == ("forces",)


class TestUnits:
    """A base in eV, and labels of the same property in another unit."""

    @staticmethod
    def base(**options):
        return tm.pretrain(
            alloys(16), tm.Property("gap", **options), painn(), steps=20, lr=0.01, unit={"gap": "eV"}, **QUICK
        )

    @staticmethod
    def tuned(base, strategy, unit="meV", factor=1e3, **options):
        structures = alloys(8, seed=4)
        for atoms in structures:
            atoms.info["gap"] *= factor
        return tm.finetune(
            base, structures, tm.Property("gap", **options), strategy=strategy, unit={"gap": unit}, **QUICK
        )

    @pytest.mark.parametrize("options", [{}, {"pooling": "composition"}, {"uncertainty": True}])
    def test_what_is_kept_is_converted(self, options):
        base, test = self.base(**options), alloys(4, seed=5)
        before, after = (tm.predict(m, test, verbose=False) for m in (base, self.tuned(base, "zero-shot", **options)))
        names = ["gap", "gap_std"] if options.get("uncertainty") else ["gap"]
        for name in names:
            old, new = ([atoms.info[name] for atoms in some] for some in (before, after))
            assert new == pytest.approx([1e3 * value for value in old], rel=1e-5)

    def test_alignment_begins_from_what_was_converted(self):
        base = self.base()
        same, other = (
            self.tuned(base, "aligned", *given).card["history"][-1]["alignment"]["residual"]["gap"]
            for given in (("eV", 1.0), ("meV", 1e3))
        )
        assert other["before"] == pytest.approx(1e3 * same["before"], rel=1e-4)
        assert other["after"] == pytest.approx(1e3 * same["after"], rel=1e-4)

    def test_errors_are_those_in_the_unit_of_the_model(self):
        base = self.base()
        same, other = alloys(8, seed=4), alloys(8, seed=4)
        for atoms in other:
            atoms.info["gap"] *= 1e3
        given, converted = (
            tm.evaluate(base, some, unit={"gap": unit}, verbose=False)["gap"]
            for some, unit in ((same, "eV"), (other, "meV"))
        )
        assert converted["mae"] == pytest.approx(given["mae"], rel=1e-6)
        assert converted["unit"] == "eV"
        with pytest.raises(tm.InputError, match="is in THz here, and in eV in the model"):
            tm.evaluate(base, other, unit={"gap": "THz"}, verbose=False)

    def test_it_is_said(self, capsys):
        base = self.base()
        structures = alloys(8, seed=4)
        tm.finetune(
            base, structures, tm.Property("gap"), strategy="zero-shot", unit={"gap": "meV"},
            **{**QUICK, "verbose": True},
        )  # fmt: skip
        assert "The base gives 'gap' in eV, these labels are in meV" in " ".join(capsys.readouterr().err.split())

    def test_what_cannot_be_converted_is_refused(self):
        with pytest.raises(tm.InputError, match="in eV, and these labels are in cm\\^-1, which cannot be converted"):
            self.tuned(self.base(), "zero-shot", "cm^-1")

    def test_a_probe_is_fitted_anew_whatever_the_unit(self):
        assert self.tuned(self.base(), "probe", "cm^-1").card["quantities"]["gap"] == ["gap", "cm^-1"]

    def test_an_uncertainty_of_an_earlier_version_is_converted_too(self):
        base, test = self.base(uncertainty=True), alloys(4, seed=5)
        base.card["quantities"]["gap_std"][1] = ""
        before, after = (
            tm.predict(m, test, verbose=False) for m in (base, self.tuned(base, "zero-shot", uncertainty=True))
        )
        old, new = ([atoms.info["gap_std"] for atoms in some] for some in (before, after))
        assert new == pytest.approx([1e3 * value for value in old], rel=1e-5)

    def test_without_a_unit_nothing_is_converted(self):
        base = self.base()
        structures, test = alloys(8, seed=4), alloys(4, seed=5)
        model = tm.finetune(base, structures, tm.Property("gap"), strategy="zero-shot", **QUICK)
        old, new = ([a.info["gap"] for a in tm.predict(m, test, verbose=False)] for m in (base, model))
        assert new == pytest.approx(old)


@pytest.mark.parametrize("strategy", ["zero-shot", "aligned"])
def test_what_the_base_does_not_have_is_not_drawn_at_random(strategy):
    with pytest.raises(tm.InputError, match=f"has no output 'gap' of this kind, which {strategy} would have to draw"):
        tm.finetune(potential(), alloys(8), tm.Property("gap"), strategy=strategy, **QUICK)
    with pytest.raises(tm.InputError, match="has no output 'gap' of this kind"):
        tm.finetune(gap_model(), alloys(8), tm.Property("gap", kind="extensive"), strategy=strategy, **QUICK)
