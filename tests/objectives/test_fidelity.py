"""Levels of theory in one model: what they share, what differs, and that each of them is a plain model in use."""

from __future__ import annotations

import functools
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.alloys import QUICK, alloys, gap_model, painn, potential, ready
from transfermium import cli
from transfermium.graph import to_batch, to_graph
from transfermium.heads import Head, LevelHead, level_input, with_levels
from transfermium.model import described
from transfermium.objectives.base import told
from transfermium.testing import check_head

LEVELS = ["pbe", "scan"]
REFERENCES = {29: -3.0, 79: -11.0}  # eV, of copper and gold, by which the levels differ


def dear(structures: list[Atoms]) -> list[Atoms]:
    """The same at another level: a smooth function of the structure, and other energies of the elements."""
    copies = [atoms.copy() for atoms in structures]
    for copy, atoms in zip(copies, structures, strict=True):
        energy = 1.15 * atoms.get_potential_energy() + 0.05 * atoms.get_volume()
        stress = 1.15 * atoms.get_stress() + 0.05 * np.array([1, 1, 1, 0, 0, 0])
        energy += sum(REFERENCES[z] for z in atoms.numbers)
        copy.calc = SinglePointCalculator(copy, energy=energy, forces=1.15 * atoms.get_forces(), stress=stress)
        copy.info["gap"] = 1.5 * atoms.info["gap"] + 4.0
    return copies


def data() -> dict[str, list[Atoms]]:
    return {"pbe": alloys(10), "scan": dear(alloys(5, seed=1))}


@functools.cache
def joint(steps: int = 20) -> tm.Model:
    """A potential of both levels; leave it as it is."""
    return tm.pretrain(data(), tm.Fidelities(tm.Potential(), LEVELS), painn(), steps=steps, lr=0.01, **QUICK)


@functools.cache
def joint_gap(kind: str = "intensive", steps: int = 20) -> tm.Model:
    objective = tm.Fidelities(tm.Property("gap", kind), LEVELS)  # type: ignore[arg-type]
    return tm.pretrain(data(), objective, painn(), steps=steps, lr=0.01, **QUICK)


def predicted(model: tm.Model, structures: list[Atoms], part: str | None = None) -> list[Atoms]:
    return tm.predict(model, structures, part=part, verbose=False)


def energies(model: tm.Model, structures: list[Atoms], part: str | None = None) -> np.ndarray:
    return np.array([atoms.get_potential_energy() for atoms in predicted(model, structures, part)])


def forces(model: tm.Model, structures: list[Atoms], part: str | None = None) -> np.ndarray:
    return np.concatenate([atoms.get_forces() for atoms in predicted(model, structures, part)])


def gaps(model: tm.Model, structures: list[Atoms], part: str | None = None) -> np.ndarray:
    return np.array([atoms.info["gap"] for atoms in predicted(model, structures, part)])


# ------------------------------------------------------------------------------------------------------------ physics


class TestPhysics:
    def test_before_training_levels_differ_by_references_alone(self):
        model, held_out = joint(steps=0), alloys(4, seed=3)
        pbe, scan = (model.part(level).heads["energy"].references for level in LEVELS)
        shifts = [float((scan - pbe)[atoms.numbers].sum()) for atoms in held_out]
        assert min(map(abs, shifts)) > 1
        difference = energies(model, held_out, "scan") - energies(model, held_out, "pbe")
        np.testing.assert_allclose(difference, shifts, atol=1e-5)
        np.testing.assert_array_equal(forces(model, held_out, "scan"), forces(model, held_out, "pbe"))

    def test_training_tells_levels_apart(self):
        model, held_out = joint(), alloys(4, seed=3)
        assert np.abs(forces(model, held_out, "scan") - forces(model, held_out, "pbe")).max() > 1e-3

    def test_a_scarce_level_learns_from_a_plentiful_one(self):
        """Six energies of one level, beside forces of another: forces of the first, which nobody has shown it."""
        few, held_out = dear(alloys(6, seed=1)), dear(alloys(12, seed=2))
        bare = tm.Potential(forces=0.0, stress=0.0)
        run: dict[str, Any] = {"steps": 100, "lr": 0.02, "valid_fraction": 0, **QUICK}
        alone = tm.pretrain(few, bare, painn(), **run)
        objective = tm.Fidelities({"pbe": tm.Potential(), "scan": bare})
        both = tm.pretrain({"pbe": alloys(30), "scan": few}, objective, painn(), **run)
        one, two = (tm.evaluate(m, held_out, verbose=False) for m in (alone, both.part("scan")))
        assert two["forces"]["mae"] < 0.5 * one["forces"]["mae"]  # 0.29 against 0.88 eV/Å
        assert two["energy_per_atom"]["mae"] < 0.9 * one["energy_per_atom"]["mae"]

    @pytest.mark.parametrize("kind", ["intensive", "extensive"])
    def test_a_property_starts_from_the_mean_and_spread_of_each_level(self, kind):
        model = joint_gap(kind, steps=0)
        for level, structures in data().items():
            labels = np.array([a.info["gap"] for a in structures]) / (len(structures[0]) if kind == "extensive" else 1)
            head = model.part(level).heads["gap"]
            trained = len(structures) - 1  # up to one validates
            shift = head.shift
            if kind == "extensive":
                shift = torch.stack([head.shift[atoms.numbers].mean() for atoms in structures])
            assert float(shift.mean()) == pytest.approx(labels.mean(), abs=2 * labels.std() / np.sqrt(trained))
            assert float(head.scale) == pytest.approx(labels.std(), rel=0.5)
        held_out = alloys(4, seed=3)
        difference = gaps(model, held_out, "scan") - gaps(model, held_out, "pbe")
        assert difference.mean() == pytest.approx(4.0 + 0.5 * np.mean([a.info["gap"] for a in held_out]), rel=0.2)


# ---------------------------------------------------------------------------------------------------- heads and parts

KINDS: list[Head] = [
    tm.EnergyHead(8),
    tm.ScalarHead(8),
    tm.ScalarHead(8, "sum"),
    tm.ScalarHead(8, "attention"),
    tm.AtomHead(8),
    tm.CompositionHead(8, "extensive", heads=2, layers=(2, 1)),
    tm.DeviationHead(8),
]


@pytest.mark.parametrize("head", KINDS, ids=lambda head: type(head).__name__)
class TestLevelHead:
    def shared(self, head: Head) -> LevelHead:
        found = with_levels(head, LEVELS)
        assert isinstance(found, LevelHead)
        generator = torch.Generator().manual_seed(0)
        for name in found.own:
            getattr(found, name).copy_(torch.rand(getattr(found, name).shape, generator=generator).double() + 0.5)
        return found

    def test_it_keeps_every_law(self, head):
        torch.manual_seed(0)
        check_head(self.shared(head), painn(inputs=[level_input(level) for level in LEVELS]))

    def test_a_mixed_batch_is_each_level_alone(self, head):
        torch.manual_seed(0)
        model = tm.Model(painn(), {"x": self.shared(head)}).eval()
        structures = alloys(3)
        of = ["scan", "pbe", "scan"]
        given = [{level_input(level): np.array([float(level == own)]) for level in LEVELS} for own in of]
        mixed = model(to_graph(structures, model.backbone.edges, given))["x"].flatten()
        alone = [
            tm.Model(model.backbone, {"x": model.heads["x"].at(level)}).eval()(to_graph([a], model.backbone.edges))["x"]
            for a, level in zip(structures, of, strict=True)
        ]
        torch.testing.assert_close(mixed, torch.cat(alone).flatten())

    def test_it_goes_on_from_a_plain_head_and_gains_levels(self, head):
        torch.manual_seed(0)
        plain = self.shared(head).at("scan")
        begun = with_levels(type(head)(**described(head)["arguments"]), LEVELS)
        begun.start_from(plain)
        more = with_levels(type(head)(**described(head)["arguments"]), ["scan", "hse"])
        more.start_from(self.shared(begun.at("pbe")))
        for level in LEVELS:
            assert same(begun.at(level), plain)
        other = self.shared(plain)
        more.start_from(other)
        assert same(more.at("scan"), other.at("scan")) and same(more.at("hse"), other.at("pbe"))


def same(one: Head, other: Head) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cls", [tm.PaiNN, tm.ET, tm.TensorNet, tm.CGCNN, tm.CGAT])
def test_a_part_is_the_model_that_is_told_its_level(cls):
    objective = tm.Fidelities(tm.Property("gap"), LEVELS)
    torch.manual_seed(0)
    backbone = told(cls(), objective)
    model = tm.Model(backbone, objective.outputs(backbone.width)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = {"outputs": {"gap": "gap"}, "card": {}}
    model.card["parts"] = {level: {**plain, "inputs": objective.constants(level)} for level in LEVELS}
    structures = alloys(2)
    found = []
    for level in LEVELS:
        given = [{name: np.array([value]) for name, value in objective.constants(level).items()}] * 2
        found.append(model(to_graph(structures, backbone.edges, given))["gap"])
        part = model.part(level)
        assert part.backbone.inputs == () and backbone.inputs == objective.scalar_inputs()
        torch.testing.assert_close(part(to_graph(structures, backbone.edges))["gap"], found[-1])
    assert (found[0] - found[1]).abs().min() > 1e-3
    with pytest.raises(tm.InputError, match="has to be told 'level_pbe'"):
        model(to_graph(structures, backbone.edges))


# ------------------------------------------------------------------------------------------------- training, transfer


class TestUse:
    def test_a_level_has_to_be_chosen_and_is_a_plain_model(self, tmp_path):
        run: dict[str, Any] = {"steps": 5, "out": tmp_path / "run", **QUICK}
        objective = tm.Fidelities(tm.Potential(), LEVELS)
        once = tm.pretrain(data(), objective, painn(), **run)
        again = tm.pretrain(data(), objective, painn(), **run)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in once.state_dict().items())
        model, held_out = tm.load(tmp_path / "run"), dear(alloys(4, seed=3))
        for use in (
            lambda: tm.Calculator(model),
            lambda: tm.evaluate(model, held_out, verbose=False),
            lambda: tm.predict(model, held_out, verbose=False),
            lambda: tm.finetune(model, held_out, tm.Potential(), steps=5, **QUICK),
            lambda: tm.finetune(model, data(), tm.Fidelities(tm.Potential(), ["pbe", "hse"]), steps=5, **QUICK),
        ):
            with pytest.raises(tm.InputError, match=r"choose one with part .--part.: pbe or scan"):
                use()
        errors = [tm.evaluate(model, held_out, part=level, verbose=False)["energy_per_atom"]["mae"] for level in LEVELS]
        assert errors[1] < 1 < errors[0]
        assert {"pbe energy_per_atom", "pbe forces"} <= model.card["metrics"]["validation"].keys()
        part = model.part("scan")
        part.save(tmp_path / "scan.safetensors")
        plain = tm.load(tmp_path / "scan.safetensors")
        assert described(plain.backbone) == described(painn()) and isinstance(plain.heads["energy"], tm.EnergyHead)
        energy = tm.Calculator(plain).get_potential_energy(held_out[0])
        assert energy == tm.Calculator(model, part="scan").get_potential_energy(held_out[0])
        tuned = tm.finetune(model, held_out, tm.Potential(), part="scan", align=False, steps=0, **QUICK)
        np.testing.assert_array_equal(energies(tuned, held_out), energies(model, held_out, "scan"))

    def test_a_level_has_its_own_references_elements_and_names(self):
        structures = data()
        for atoms in structures["scan"]:
            atoms.numbers[atoms.numbers == 79] = 47
        for level, some in structures.items():
            for atoms in some:
                atoms.info["level"] = level
        for given in (structures, [*structures["pbe"], *structures["scan"]]):
            model = tm.pretrain(given, tm.Fidelities(tm.Potential(), LEVELS), painn(), steps=1, **QUICK)
            for level, element in (("pbe", "Au"), ("scan", "Ag")):
                card = model.part(level).card
                assert set(card["elements"]) == set(card["references (eV)"]) == {"Cu", element}
                assert card["levels"].keys() == {level}
            assert model.card["references (eV)"] == {}
            assert model.card["metrics"]["validation"].keys() & {"pbe forces", "scan forces"}

    def test_levels_may_be_said_by_the_structures(self):
        for level, structures in (given := data()).items():
            for atoms in structures:
                atoms.info["level"] = level
        joined, split = [a for some in given.values() for a in some], {**QUICK, "valid_fraction": 0}
        objective = tm.Fidelities(tm.Potential(), LEVELS)
        named, said = (tm.pretrain(s, objective, painn(), steps=3, **split) for s in (given, joined))
        assert all(torch.equal(value, said.state_dict()[name]) for name, value in named.state_dict().items())
        for atoms in joined:
            atoms.info["level"] = {"pbe": "PBE+U", "scan": "r2SCAN"}[atoms.info["level"]]
        other = tm.pretrain(joined, tm.Fidelities(tm.Potential(), ["PBE+U", "r2SCAN"]), painn(), steps=3, **split)
        assert energies(other, joined[:1], "PBE+U") == energies(named, joined[:1], "pbe")
        joined[3].info["level"] = "b3lyp"
        with pytest.raises(tm.InputError, match=r"of the level 'b3lyp', but the levels are PBE\+U, r2SCAN"):
            tm.pretrain(joined, tm.Fidelities(tm.Potential(), ["PBE+U", "r2SCAN"]), painn(), steps=3, **split)
        del joined[3].info["level"]
        with pytest.raises(
            tm.InputError, match=r"has labels, but no level: give structures as PBE\+U=FILE r2SCAN=FILE"
        ):
            tm.pretrain(joined, tm.Fidelities(tm.Potential(), ["PBE+U", "r2SCAN"]), painn(), steps=3, **split)

    def test_the_command_line_takes_levels_as_parts(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        for level, structures in data().items():
            ase.io.write(f"{level}.extxyz", structures)
        words = "pretrain pbe=pbe.extxyz scan=scan.extxyz --objective Fidelities --objective.parts Potential"
        more = (
            "--objective.levels [pbe,scan] --backbone PaiNN --backbone.width 8 --backbone.depth 1 --steps 1 --out run"
        )
        cli.main([*words.split(), *more.split(), "--device", "cpu"])
        cli.main(["evaluate", "run", "scan.extxyz", "--part", "scan", "--device", "cpu"])
        assert "energy per atom" in capsys.readouterr().out


class TestFinetune:
    def test_levels_start_from_a_plain_base(self):
        base, held_out = potential(), alloys(4, seed=3)
        model = tm.finetune(base, data(), tm.Fidelities(tm.Potential(), LEVELS), steps=0, align=False, **QUICK)
        for level in LEVELS:
            np.testing.assert_array_equal(energies(model, held_out, level), energies(base, held_out))
            np.testing.assert_array_equal(forces(model, held_out, level), forces(base, held_out))

    def test_references_are_aligned_for_each_level(self):
        base, held_out = potential(), alloys(4, seed=3)
        model = tm.finetune(base, data(), tm.Fidelities(tm.Potential(), LEVELS), steps=0, **QUICK)
        report = model.card["history"][-1]["alignment"]
        assert report["kept heads"] == ["energy"]
        for level in LEVELS:
            shift = report[f"reference shift (eV) of {level} energy"]
            expected = [sum(shift[symbol] for symbol in atoms.symbols) for atoms in held_out]
            moved = energies(model, held_out, level) - energies(base, held_out)
            np.testing.assert_allclose(moved, expected, atol=1e-5)
        errors = [tm.evaluate(model, data()[level], part=level, verbose=False) for level in LEVELS]
        assert all(found["energy_per_atom"]["mae"] < 0.3 for found in errors)

    def test_a_property_is_aligned_for_each_level(self):
        base, held_out = gap_model(), alloys(4, seed=3)
        model = tm.finetune(base, data(), tm.Fidelities(tm.Property("gap"), LEVELS), steps=0, **QUICK)
        shifts = model.card["history"][-1]["alignment"]["shift"]
        for level in LEVELS:
            moved = gaps(model, held_out, level) - gaps(base, held_out)
            np.testing.assert_allclose(moved, shifts[f"{level} gap"], atol=1e-5)
        assert abs(shifts["pbe gap"]) < 1 < 5 < shifts["scan gap"]

    def test_a_base_that_denoises_gets_the_scale_of_forces(self):
        base = tm.pretrain(alloys(6), tm.Denoise(0.1), painn(), steps=5, **QUICK)
        model = tm.finetune(base, data(), tm.Fidelities(tm.Potential(), LEVELS), steps=0, **QUICK)
        factor = model.card["history"][-1]["alignment"]["scale"]["energy"]
        held_out = alloys(4, seed=3)
        way_back = np.concatenate([a.arrays["denoising_displacement"] for a in predicted(base, held_out)])
        np.testing.assert_allclose(forces(model, held_out, "scan"), factor * way_back, atol=1e-5)
        assert factor > 1.5

    def test_several_levels_go_on_as_they_are_and_gain_another(self):
        base, held_out, given = joint(), alloys(4, seed=3), {**data(), "hse": dear(alloys(4, seed=5))}
        for levels in (LEVELS[::-1], ["hse", *LEVELS]):
            some, objective = {level: given[level] for level in levels}, tm.Fidelities(tm.Potential(), levels)
            model = tm.finetune(base, some, objective, steps=0, align=False, **QUICK)
            for level in LEVELS:
                np.testing.assert_allclose(energies(model, held_out, level), energies(base, held_out, level), atol=1e-5)
        assert np.isfinite(energies(model, held_out, "hse")).all()
        aligned = tm.finetune(base, some, objective, steps=0, **QUICK)
        errors = tm.evaluate(aligned, given["hse"], part="hse", verbose=False)
        assert errors["energy_per_atom"]["mae"] < 0.5

    def test_training_goes_on(self):
        model = tm.finetune(joint(), data(), tm.Fidelities(tm.Potential(), LEVELS), steps=3, lr=0.01, **QUICK)
        before, after = joint().backbone.state_dict(), model.backbone.state_dict()
        name = f"node_inputs.inputs.{level_input('scan')}.weight"
        assert not torch.equal(before[name], after[name])


# --------------------------------------------------------------------------------------------------------------- loss


def test_a_level_counts_alike_however_few_its_labels():
    objective = tm.Fidelities(tm.Potential(1.0, 0.0, 0.0), LEVELS, weights={"scan": 3.0})
    structures = alloys(6)
    for index, atoms in enumerate(structures):
        atoms.info["level"] = "scan" if index == 2 else "pbe"
    labelled = ready(structures)
    samples = [objective.prepare(labelled[i], np.random.default_rng(0)) for i in range(6)]
    batch = to_batch(samples, painn().edges)
    energy = torch.tensor([sample.atoms.info["energy"] for sample in samples])
    errors = torch.tensor([1.0, 2.0, 5.0, 3.0, 4.0, 5.0]) * 4  # of four atoms
    terms = {name: (float(s), int(n)) for name, (s, n) in objective.loss({"energy": energy + errors}, batch).items()}
    assert terms["pbe energy"] == (pytest.approx(15.0, rel=1e-4), 5)
    assert terms["scan energy"] == (pytest.approx(3 * 5.0, rel=1e-4), 1)


def test_each_level_settles_its_own_weights():
    objective = tm.Fidelities(tm.Property("gap"), LEVELS)
    samples = [
        objective.prepare(atoms, np.random.default_rng(0))
        for level, some in data().items()
        for atoms in some
        for atoms.info["level"] in [level]
    ]
    settled = objective.settled(samples)
    assert isinstance(settled, tm.Fidelities) and settled.levels == LEVELS
    for level, some in data().items():
        spread = np.std([atoms.info["gap"] for atoms in some])
        assert settled.parts[level].weight == pytest.approx(1 / spread)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"parts": tm.Potential()}, "levels has no name"),
        ({"parts": {}}, "nothing to learn together"),
        ({"parts": {"pbe": tm.Potential()}, "levels": ["scan"]}, "levels are scan, but objectives are of pbe"),
        ({"parts": {"pbe": tm.Potential(), "gap": tm.Property("gap")}}, "pbe and gap would have other outputs"),
        ({"parts": {"a": tm.Property("x"), "b": tm.Property("x", "extensive")}}, "a and b would have other outputs"),
        ({"parts": tm.Denoise(told_forces=True), "levels": ["a"]}, "tells the model vectors"),
        ({"parts": tm.Potential(), "levels": ["PBE/U"]}, "'PBE/U' cannot name a part"),
        ({"parts": tm.Potential(), "levels": LEVELS, "weights": {"hse": 1.0}}, "a weight for 'hse', but the parts are"),
        ({"parts": tm.Fidelities(tm.Potential(), LEVELS), "levels": ["a"]}, "must be an objective such as"),
    ],
)
def test_senseless_levels_are_refused(arguments, words):
    with pytest.raises(tm.InputError, match=words):
        tm.Fidelities(**arguments)


def test_a_backbone_has_to_take_inputs():
    class Deaf(tm.Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8

    class Careless(Deaf):
        def __init__(self, inputs: tuple[str, ...] = ()) -> None:
            super().__init__()
            self.inputs = inputs

    with pytest.raises(tm.InputError, match="Careless has no NodeInputs that takes level_pbe, level_scan"):
        told(Careless(), tm.Fidelities(tm.Potential(), LEVELS))
    with pytest.raises(tm.InputError, match="level_pbe, level_scan per atom, but Deaf takes no inputs"):
        told(Deaf(), tm.Fidelities(tm.Potential(), LEVELS))
