"""`doctor` finds what was spoiled, says nothing of what is sound, and its fixes mend."""

from __future__ import annotations

import io
import json
import lzma
import shlex
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console

import transfermium as tm
from benchmarks.reliability.corruptions import CORRUPTIONS, Corruption, copied, found
from tests.alloys import alloys, gap_model, potential
from transfermium import cli
from transfermium.data.formats import _xyz_frames
from transfermium.doctor import doctor, duplicates, yardstick
from transfermium.doctor.base import Case
from transfermium.doctor.duplicates import copies
from transfermium.doctor.pairs import similar, slope
from transfermium.report.doctor import show, verdict

SOUND = {  # sets that are sound, and how many of their structures are looked at here
    "md17_ethanol/all": 100,
    "bo2_polymorphs_4xc/PBE": 120,
    "mattersim_benchmarks/mpf-TP": 150,
    "mattersim_benchmarks/alexandria-random-1k": 150,
    "mlearn/Ge_train": 80,
    "water_pbe0ts/train": 8,
    "jarvis_supercon/all": 150,
}
OF_ETHANOL = {  # what is clearer in molecules
    "energies and forces in atomic units",
    "forces in another order",
    "positions turned, forces not",
}


@pytest.fixture(autouse=True)
def a_quick_yardstick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(yardstick, "MOST_STRUCTURES", 60)
    monkeypatch.setattr(yardstick, "MOST_ATOMS", 700)
    monkeypatch.chdir(tmp_path)


def some_of(public_data: Path, name: str, n: int) -> list[Atoms]:
    path = public_data / f"{name}.extxyz.xz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return list(islice(_xyz_frames(path), n))


def undivided(structures: list[Atoms]) -> list[Atoms]:
    for atoms in structures:
        atoms.info.pop("split", None)
    return structures


def kinds(diagnosis: object, severity: str = "error") -> list[str]:
    return [one.kind for one in diagnosis.findings if one.severity == severity]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def crystals(public_data: Path) -> list[Atoms]:
    """Hot and compressed crystals of many elements."""
    return undivided(some_of(public_data, "mattersim_benchmarks/mpf-TP", 260))


@pytest.fixture(scope="module")
def ethanol(public_data: Path) -> list[Atoms]:
    return undivided(some_of(public_data, "md17_ethanol/all", 150))


class TestSpoiled:
    @pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda one: one.name)
    def test_the_cause_is_found(self, corruption: Corruption, crystals: list[Atoms], ethanol: list[Atoms]) -> None:
        structures = ethanol if corruption.name in OF_ETHANOL else crystals
        findings = doctor(corruption.spoil(copied(structures))).findings
        assert found([(one.kind, one.cause) for one in findings], corruption), [(f.kind, f.cause) for f in findings]

    def test_there_are_many_ways(self) -> None:
        assert len({one.name for one in CORRUPTIONS}) == len(CORRUPTIONS) >= 25

    @pytest.mark.parametrize("name", SOUND)
    def test_nothing_is_wrong_with_sound_data(self, name: str, public_data: Path) -> None:
        assert kinds(doctor(some_of(public_data, name, SOUND[name]))) == []

    @pytest.mark.parametrize(("elements", "sigma"), [("Pt", 0.1), ("PtAu", 0.1), ("PdAu", 0.08), ("CuAg", 0.08)])
    def test_rattled_metals_are_sound(self, elements: str, sigma: float) -> None:
        """Half of the work is lost between structures that are far apart, and two metals have two lattice constants."""
        symbols = [elements[i : i + 2] for i in range(0, len(elements), 2)]
        assert kinds(doctor([one for symbol in symbols for one in cells(symbol, 20, sigma)])) == []

    @pytest.mark.parametrize(
        ("symbol", "structure", "a"),
        [("K", "bcc", 5.33), ("Cs", "bcc", 6.14), ("Ar", "fcc", 5.26), ("Kr", "fcc", 5.65)],
    )
    def test_neighbours_can_be_far_apart(self, symbol: str, structure: str, a: float) -> None:
        rng = np.random.default_rng(0)
        structures = [bulk(symbol, structure, a=a, cubic=True) * (2, 2, 2) for _ in range(8)]
        for atoms in structures:
            atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
        sigma = 0.64 * a
        diagnosis = doctor(
            [labelled(atoms, LennardJones(sigma=sigma, epsilon=0.01, rc=2 * sigma)) for atoms in structures]
        )
        assert [one for one in diagnosis.findings if one.severity != "note"] == []

    def test_molecules_that_fall_apart_are_sound(self) -> None:
        pairs = [Atoms("N2", [[0, 0, 0], [0, 0, d]]) for d in np.linspace(0.9, 3.5, 12)]
        triples = [Atoms("CO2", [[0, 0, 0], [0, 0, -1.16], [0, 0, d]]) for d in np.linspace(1, 6, 12)]
        assert kinds(doctor(pairs)) == kinds(doctor(triples)) == []

    def test_atoms_that_are_alone_are_told_in_any_number(self) -> None:
        """Even where half of the structures have one."""
        structures = [bulk("Cu", cubic=True) for _ in range(8)]
        for atoms in structures[::2]:
            atoms.pbc = False
            atoms.positions[0] -= 20
        assert doctor(structures)["exploded"].structures == (0, 2, 4, 6)

    def test_atoms_at_the_border_of_a_forgotten_cell_are_not_alone(self) -> None:
        atoms = bulk("Cu", cubic=True) * (2, 2, 2)
        atoms = atoms[(np.linalg.norm(atoms.positions, axis=1) > 4) | (np.arange(32) == 0)]
        atoms.pbc = False
        assert [one.kind for one in doctor([atoms]).findings] == ["pbc-lost"]

    @pytest.mark.parametrize("name", ["gap", "energy"])
    def test_one_placeholder_is_enough(self, name: str) -> None:
        structures = rattled(30)
        (structures[4].calc.results if name == "energy" else structures[4].info)[name] = -999.0
        diagnosis = doctor(structures)
        assert diagnosis[f"placeholder-{name}"].structures == (4,) and len(diagnosis.findings) == 1

    def test_nearly_empty_cells_are_told(self) -> None:
        structures = [Atoms("CO2", [[0, 0, 0], [0, 0, 1.2], [0, 0, -1.2]], cell=[40] * 3, pbc=True) for _ in range(3)]
        assert doctor(structures)["cell-empty"].structures == (0, 1, 2)

    def test_lengths_in_no_unit_are_a_warning(self) -> None:
        structures = [Atoms("Cu4", [[0, 0, d * k] for k in range(4)]) for d in np.linspace(0.8, 0.9, 6)]
        diagnosis = doctor(structures)
        assert kinds(diagnosis) == [] and "0.32 sums" in diagnosis["lengths-unusual"].title

    def test_the_shear_components_of_three_sets_are_in_another_order(self, public_data: Path) -> None:
        """Cells of molybdenum that are sheared in yz have a stress in xz: energies agree with the other order."""
        finding = doctor(some_of(public_data, "mlearn/Mo_train", 194))["stress-order"]
        assert "xz yz xy" in finding.title
        assert "energies of sheared cells" in finding.evidence[0]

    def test_the_order_of_shear_components_is_told_of_groups(
        self, public_data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of germanium it is another in all frames but those that were strained on purpose."""
        monkeypatch.setattr(yardstick, "MOST_ATOMS", 2_000)
        structures = some_of(public_data, "mlearn/Ge_train", 228)
        moving = [i for i, atoms in enumerate(structures) if atoms.info["group"] in ("Vacancy", "AIMD-NVT")]
        finding = doctor(structures)["stress-order"]
        assert list(finding.structures) == moving and "['stress-order'].structures" in finding.fix

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_unit_of_a_stress_shows_in_its_size(self, sign: int, public_data: Path) -> None:
        """Where shear components in another order, and what little else there is, follow no potential."""
        structures = some_of(public_data, "mlearn/Ge_train", 60)
        for atoms in structures:
            atoms.calc.results["stress"] = atoms.calc.results["stress"] * sign * 1602.18
        diagnosis = doctor(structures)
        assert "kbar" in diagnosis["stress-unit"].title and kinds(diagnosis, "warning") == []

    def test_large_forces_are_a_warning(self, public_data: Path) -> None:
        structures = some_of(public_data, "mad_pbesol_1000/all", 120)
        finding = doctor(structures)["forces-large"]
        above = [i for i, atoms in enumerate(structures) if np.abs(atoms.get_forces()).max() > 30]
        assert finding.severity == "warning" and list(finding.structures) == above

    def test_absurd_properties_are_a_warning(self, public_data: Path) -> None:
        diagnosis = doctor(some_of(public_data, "phonon_dielectric_mp/all", 1511))
        assert diagnosis["outliers-eps_electronic"].severity == "warning" and not diagnosis.errors

    def test_absurd_stresses_are_a_warning(self, public_data: Path) -> None:
        diagnosis = doctor(some_of(public_data, "mattersim_benchmarks/mptrj-highest-stress-1k", 300))
        assert diagnosis["stress-absurd"].severity == "warning"


class TestMixtures:
    """Halves of a set that are not alike."""

    @pytest.mark.parametrize(
        ("spoil", "kind", "words"),
        [
            ({"energy": lambda e: e / 27.2114}, "energy-mixed-units", "in hartree"),
            ({"energy": lambda e: e * 23.0605}, "energy-mixed-units", "in kcal/mol"),
            ({"energy": lambda e: e / 32}, "energy-mixed-units", "per atom"),
            ({"energy": lambda e: e + 60}, "energy-mixed-zero", "of another zero"),
            ({"forces": lambda f: -f}, "forces-mixed-sign", "gradients"),
            ({"forces": lambda f: f / 51.422}, "forces-mixed-units", "in hartree/bohr"),
            ({"forces": lambda f: -f * 1000}, "forces-mixed-units", "gradients in meV/Å"),
        ],
    )
    def test_a_half_is_told_and_mended(
        self, spoil: dict[str, Callable[[Any], Any]], kind: str, words: str, frames: list[Atoms]
    ) -> None:
        structures = copied(frames)
        for atoms in structures[10:]:
            for name, change in spoil.items():
                atoms.calc.results[name] = change(atoms.calc.results[name])
        data = saved(structures)
        diagnosis = doctor(data)
        assert kinds(diagnosis) == [kind] and words in diagnosis[kind].title
        if kind != "energy-mixed-zero":  # of which no half is the right one
            assert diagnosis[kind].structures == tuple(range(10, 20))
        run(diagnosis[kind].fix)
        assert kinds(doctor("repaired")) == []

    def test_what_geometry_or_information_explains_is_sound(self, frames: list[Atoms]) -> None:
        hot = cells("Cu", 10, 0.25)
        for atoms in hot:
            atoms.calc.results["energy"] -= 100 * len(atoms)
        assert kinds(doctor([*frames[:10], *hot])) == []
        charged = copied(frames)
        for index, atoms in enumerate(charged):
            atoms.info["charge"] = index // 10
            atoms.calc.results["energy"] += 60 * (index // 10)
        assert kinds(doctor(charged)) == []

    def test_a_unit_holds_for_nearly_all_pairs(self) -> None:
        work = np.linspace(0.1, 1, 50)
        change = np.where(np.arange(50) % 5 < 3, work / 27.2, work)
        mixed, whole = slope(change, work), slope(work / 27.2, work)
        assert mixed is not None and whole is not None and whole.holds and not mixed.holds


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    """Rattled copper, of which energies are totals."""
    structures = cells("Cu", 20, 0.05)
    for atoms in structures:
        atoms.calc.results["energy"] -= 100 * len(atoms)
    return structures


def rattled(n: int = 40) -> list[Atoms]:
    """Alloys of EMT with labels of their own."""
    return copied(alloys(n))


def cells(symbol: str, n: int, sigma: float) -> list[Atoms]:
    """Rattled cells of one metal, of 32 atoms."""
    rng = np.random.default_rng(0)
    structures = [bulk(symbol, cubic=True) * (2, 2, 2) for _ in range(n)]
    for atoms in structures:
        atoms.positions += sigma * rng.normal(size=atoms.positions.shape)
    return [labelled(atoms) for atoms in structures]


def fractional(atoms: Atoms) -> None:
    atoms.positions = atoms.get_scaled_positions()


def in_pm(atoms: Atoms) -> None:
    atoms.set_cell(100 * atoms.cell.array)
    atoms.positions *= 100


def without_pbc(atoms: Atoms) -> None:
    atoms.pbc = False


def saved(structures: list[Atoms], name: str = "data.extxyz") -> str:
    ase.io.write(name, structures)
    return name


class TestFixes:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("forces are gradients", "forces-sign"),
            ("forces in Ha/bohr", "forces-unit"),
            ("stress in kbar, sign of VASP", "stress-unit"),
            ("stress in the order xy yz xz", "stress-order"),
            ("virial as stress", "stress-virial"),
            ("lengths in bohr", "length-unit"),
            ("every fifth energy per atom", "energy-mixed-units"),
            ("atoms almost in the same place", "too-close"),
            ("copies", "duplicates"),
        ],
    )
    def test_a_fix_mends(self, name: str, kind: str, crystals: list[Atoms], ethanol: list[Atoms]) -> None:
        (corruption,) = (one for one in CORRUPTIONS if one.name == name)
        structures = crystals[:160] if "stress" in corruption.needs else ethanol[:60]
        data = saved(corruption.spoil(copied(structures)))
        run(doctor(data)[kind].fix)
        after = [one.kind for one in doctor("repaired").findings]
        assert kind not in after, after

    @pytest.mark.parametrize(
        "name",
        [
            "copies with other energies",
            "test structures among training",
            "materials on both sides",
            "an element in test structures only",
            "two levels of theory",
            "two keys that disagree",
            "energies that are NaN",
            "energies are all the same",
            "pbc was lost",
        ],
    )
    def test_every_fix_runs(self, name: str) -> None:
        """Each from the same file, the others before it notwithstanding."""
        (corruption,) = (one for one in CORRUPTIONS if one.name == name)
        data = saved(corruption.spoil(rattled(30)))
        told = {one.kind for one in doctor(data).findings}
        assert told & set(corruption.kind.split("|"))
        for kind in told:
            run(doctor(data)[kind].fix)

    @pytest.mark.parametrize(
        ("spoil", "kind"), [(fractional, "length-unit"), (in_pm, "length-unit"), (without_pbc, "pbc-lost")]
    )
    def test_geometry_is_mended_and_labels_stay(self, spoil: Callable[[Atoms], None], kind: str) -> None:
        structures = cells("Cu", 4, 0.05)
        spoiled = copied(structures)
        for atoms in spoiled:
            spoil(atoms)
            atoms.calc.atoms = atoms.copy()
        run(doctor(saved(spoiled))[kind].fix)
        for mended, atoms in zip(tm.read("repaired"), structures, strict=True):
            assert mended.get_volume() == pytest.approx(atoms.get_volume(), rel=1e-6)
            assert mended.get_distance(0, 1, mic=True) == pytest.approx(atoms.get_distance(0, 1, mic=True), abs=1e-5)
            assert mended.get_potential_energy() == pytest.approx(atoms.get_potential_energy())
        assert kinds(doctor("repaired")) == []

    def test_all_units_of_a_file_are_mended_at_once(self, ethanol: list[Atoms]) -> None:
        """And once more where the result has the name that would be given next."""
        spoil = next(one.spoil for one in CORRUPTIONS if one.name == "energies and forces in atomic units")
        fixes = {one.fix for one in doctor(saved(spoil(copied(ethanol[:60])))).errors}
        assert len(fixes) == 1
        run(fixes.pop())
        diagnosis = doctor("repaired")
        assert diagnosis.errors == () and "--out repaired-2" in Case(ethanol[:2], ("repaired",)).convert(
            {"energy": "Ha"}
        )

    def test_labels_that_were_named_are_kept(self) -> None:
        structures = rattled(14)
        for atoms in structures:
            results, atoms.calc = atoms.calc.results, None
            atoms.info |= {"my_e": float(results["energy"]), "energy": 0.0}
            atoms.arrays["my_f"] = results["forces"] + [0, 0, 0.3]
        run(doctor(saved(structures), label={"energy": "my_e", "forces": "my_f"})["forces-net"].fix)
        diagnosis = doctor("repaired")
        assert diagnosis.findings == ()
        assert diagnosis.structures[0].info["energy"] == pytest.approx(structures[0].info["my_e"])

    def test_structures_without_the_label_are_passed_over(self) -> None:
        structures = rattled(30)
        for atoms in structures:
            atoms.calc.results["forces"] *= -1
        structures[3].calc = None
        del structures[5].calc.results["forces"]
        run(doctor(saved(structures))["forces-sign"].fix)
        assert kinds(doctor("repaired")) == []

    def test_properties_are_trained_on_as_such(self) -> None:
        structures = rattled(20)
        for index, atoms in enumerate(structures):
            atoms.calc = None
            atoms.info |= {"band gap": float(index % 7), "split": "train" if index < 15 else "test"}
            atoms.info.pop("gap")
        copy = structures[0].copy()
        copy.info["split"] = "test"
        run(doctor(saved([*structures, copy]))["leak"].fix)

    def test_nothing_from_a_file_is_a_command(self) -> None:
        structures = rattled(12)
        for index, atoms in enumerate(structures):
            atoms.info["level"] = "PBE" if index % 4 == 0 else "it's $(touch evil)"
        words = shlex.split(doctor(structures)["levels"].fix)
        assert words[words.index("--level") + 1] == "it's $(touch evil)"


def run(fix: str) -> None:
    if fix.startswith("transfermium"):
        brief = ["--steps", "1", "--device", "cpu"] if fix.split()[1] in ("pretrain", "finetune") else []
        cli.main([*shlex.split(fix)[1:], *brief])
    else:
        exec(fix, {})


class TestPairs:
    def test_work_is_the_change_of_energy(self) -> None:
        """Of strained and rattled cells of one alloy: forces and stress together."""
        base = rattled(1)[0]
        rng = np.random.default_rng(0)
        structures = []
        for _ in range(12):
            atoms = base.copy()
            strain = np.eye(3) + 0.004 * rng.normal(size=(3, 3))
            atoms.set_cell(atoms.cell.array @ ((strain + strain.T) / 2), scale_atoms=True)
            atoms.positions += 0.01 * rng.normal(size=(4, 3))
            structures.append(labelled(atoms))
        case = Case(structures)
        pairs = similar(case, case.everything)
        work = pairs.by_forces + pairs.by_stress
        assert len(pairs.a) == 66
        assert np.abs(pairs.change - work).max() < 0.03 * np.abs(pairs.change).max()

    def test_turned_molecules_are_compared(self) -> None:
        from ase.build import molecule

        rng = np.random.default_rng(0)
        structures = []
        for _ in range(8):
            atoms = molecule("CH3CH2OH")
            atoms.positions += 0.01 * rng.normal(size=(9, 3))
            atoms.rotate(float(rng.uniform(0, 360)), rng.normal(size=3))
            atoms.calc = LennardJones(sigma=1.2, epsilon=0.1)
            results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
            atoms.calc = SinglePointCalculator(atoms, **results)
            structures.append(atoms)
        case = Case(structures)
        pairs = similar(case, case.everything)
        fitted = slope(pairs.change, pairs.by_forces)
        assert fitted is not None and fitted.value == pytest.approx(1.0, abs=0.05) and fitted.agreement > 0.8

    def test_no_slope_without_pairs(self) -> None:
        assert slope(np.ones(4), np.ones(4)) is None


def labelled(atoms: Atoms, calculator: Calculator | None = None) -> Atoms:
    atoms.calc = calculator or EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


class TestCopies:
    def test_turned_moved_and_numbered_anew(self) -> None:
        first = rattled(3)
        other = first[1][[2, 0, 3, 1]]
        other.translate([0.4, 0.1, 0.7])
        other.wrap()
        other.rotate(33, [1, 2, 3], rotate_cell=True)
        assert copies(Case([*first, other])).same == [[1, 3]]

    def test_a_small_displacement_is_near_and_a_large_one_is_not(self) -> None:
        first = rattled(2)
        near, far = first[0].copy(), first[0].copy()
        near.positions[0, 0] += 0.002
        far.positions[0, 0] += 0.1
        found = copies(Case([*first, near, far]))
        assert found.same == [] and found.near == [[0, 2]]

    def test_copies_among_frames_that_are_all_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However few pairs are compared."""
        monkeypatch.setattr(duplicates, "MOST_CANDIDATES", 50)
        rng = np.random.default_rng(0)
        frames = [bulk("Cu", cubic=True) * (2, 2, 2) for _ in range(200)]
        for atoms in frames:
            atoms.positions += 0.02 * rng.normal(size=atoms.positions.shape)
        again = [frames[k].copy() for k in [*range(70), 3]]
        again[0].positions = np.round(again[0].positions, 5)
        found = copies(Case([*frames, *again]))
        assert [group[0] for group in found.same] == list(range(70)) and found.cut
        assert found.same[3] == [3, 203, 270]

    def test_potassium_is_not_all_one(self) -> None:
        """No neighbour is within 4 Å."""
        frames = [bulk("K", cubic=True) for _ in range(4)]
        for k, atoms in enumerate(frames):
            atoms.positions[1] += 0.1 * k
        assert copies(Case(frames)).same == []

    def test_other_elements_are_no_copies(self) -> None:
        first = rattled(1)[0]
        other = first.copy()
        other.numbers = np.where(other.numbers == 29, 47, 29)
        found = copies(Case([first, other]))
        assert found.same == found.near == []


class TestModels:
    def test_elements_and_data_of_a_base(self) -> None:
        structures = rattled(10)
        structures[3].numbers[0] = 8
        structures[3] = labelled(structures[3])
        diagnosis = doctor(structures, potential())
        assert diagnosis["elements-unseen"].structures == (3,)
        assert "O" in diagnosis["elements-unseen"].title
        assert "base-trained-on" not in [one.kind for one in diagnosis.findings]

    def test_the_data_that_a_base_was_trained_on(self) -> None:
        structures = alloys(8)
        base = tm.pretrain(
            structures, tm.Potential(), potential().backbone, steps=1, valid_fraction=0.0, verbose=False, device="cpu"
        )
        assert doctor(structures, base)["base-trained-on"].severity == "error"

    def test_tests_that_a_base_has_seen(self) -> None:
        structures = alloys(12)
        base = tm.pretrain(
            structures[:8], tm.Potential(), potential().backbone, steps=1, verbose=False, device="cpu"
        )  # fmt: skip
        held = [atoms.copy() for atoms in structures[6:]]
        diagnosis = doctor(alloys(5, seed=9), base, held_out=held)
        assert "seen 2 of 6 held-out structures" in diagnosis["base-seen-held-out"].title
        for i, atoms in enumerate(structures):
            atoms.info["split"] = "train" if i < 6 else "test"
        diagnosis = doctor(structures, base)
        assert diagnosis["base-seen"].structures == (6, 7)
        assert "base-seen" not in kinds(doctor(structures[:6] + structures[8:], base))

    def test_a_base_without_energies(self) -> None:
        assert "elements-unseen" not in [one.kind for one in doctor(rattled(6), gap_model()).findings]

    def test_leaks_into_held_out_structures_and_from_the_base(self) -> None:
        structures = rattled(12)
        diagnosis = doctor(structures, potential(), held_out=structures[2:4], base_data=structures[5:6])
        assert {2, 3} <= set(diagnosis["leak"].structures) and 5 in diagnosis["base-leak"].structures

    def test_frames_of_one_system_are_no_leaks(self) -> None:
        """Though all are alike; and a copy is one."""
        frames = cells("Cu", 16, 0.1)
        told = doctor(frames[:12], held_out=frames[12:])
        assert "leak" not in kinds(told)
        assert doctor(frames[:13], held_out=frames[12:])["leak"].structures == (12,)

    def test_atoms_in_the_same_place_do_not_end_the_search(self) -> None:
        structures = rattled(8)
        structures[3].positions[1] = structures[3].positions[0]
        diagnosis = doctor(structures, held_out=rattled(8)[5:])
        assert diagnosis["unusable"].structures == (3,) and set(diagnosis["leak"].structures) == {5, 6, 7}

    def test_commands_name_what_was_given(self) -> None:
        data, test = saved(rattled(8)), saved(rattled(3), "my test.extxyz")
        finding = doctor(data, held_out=test)["leak"]
        assert finding.fix.endswith("--held-out 'my test.extxyz' --out run")
        potential().save("own.safetensors")
        fix = doctor(data, "own.safetensors", base_data=test)["base-leak"].fix
        run(fix)
        assert len(tm.read("repaired")) == 5


class TestDiagnosis:
    def test_without_leaves_structures_out(self) -> None:
        structures = rattled(12)
        structures[4].info["converged"] = False
        diagnosis = doctor(structures)
        assert diagnosis["unconverged"].structures == (4,)
        assert [atoms for atoms in diagnosis.without("unconverged")] == structures[:4] + structures[5:]
        with pytest.raises(tm.InputError, match="doctor found no 'levels' here, but unconverged"):
            diagnosis["levels"]

    def test_without_takes_all_findings_of_a_kind(self) -> None:
        structures = rattled(20)
        for index, atoms in enumerate(structures):
            atoms.info |= {"split": "train" if index < 15 else "test", "fold": index % 2}
        structures += copied(structures[:2])
        for atoms in structures[20:]:
            atoms.info |= {"split": "test", "fold": 1 - atoms.info["fold"]}
        diagnosis = doctor(structures)
        leaks = [one.structures for one in diagnosis.findings if one.kind == "leak"]
        assert len(leaks) == 2 and len(diagnosis.without("leak")) == 22 - len(set(leaks[0] + leaks[1]))

    @pytest.mark.parametrize(
        "odd", [lambda k: [[1], [1, 2]], lambda k: np.arange(3 + k % 2), lambda k: k if k % 2 else "a"]
    )
    def test_information_that_is_no_label_may_be_anything(self, odd: Callable[[int], Any]) -> None:
        structures = rattled(12)
        for index, atoms in enumerate(structures):
            atoms.info["odd"] = odd(index)
        assert kinds(doctor(structures)) == []

    def test_a_named_label_that_one_structure_lacks_and_one_has_not_finite(self) -> None:
        structures = rattled(12)
        for index, atoms in enumerate(structures):
            atoms.info["my_e"] = atoms.calc.results.pop("energy") if index != 2 else float("nan")
        del structures[4].info["my_e"]
        assert doctor(structures, label={"energy": "my_e"})["unreadable-energy"].structures == (2,)

    def test_what_all_structures_share_is_no_placeholder(self) -> None:
        structures = rattled(8)
        for atoms in structures:
            atoms.info["temperature"] = 300.0
            atoms.set_tags(1)
        assert doctor(structures).findings == ()
        assert doctor(structures, unit={"temperature": "K"})["constant-temperature"].severity == "warning"

    def test_a_base_of_another_level_with_a_similar_name(self) -> None:
        structures = rattled(6)
        for atoms in structures:
            atoms.info["level"] = "PBE"
        card = {**potential().card, "levels": {"PBEsol": 16}}
        assert doctor(structures, tm.Model(potential().backbone, dict(potential().outputs), card))["levels-base"]

    def test_units_that_are_declared_are_not_told(self) -> None:
        spoil = next(one.spoil for one in CORRUPTIONS if one.name == "forces in meV/Å")
        structures = spoil(rattled(40))
        assert kinds(doctor(structures)) == ["forces-unit"]
        assert kinds(doctor(structures, unit={"forces": "meV/Å"})) == []

    def test_each_file_is_judged_by_itself(self) -> None:
        spoil = next(one.spoil for one in CORRUPTIONS if one.name == "forces in meV/Å")
        files = [saved(rattled(30), "a.extxyz"), saved(spoil(rattled(30)), "b.extxyz")]
        (finding,) = (one for one in doctor(files).findings if one.kind == "forces-unit")
        assert "b.extxyz" in finding.title and finding.structures == tuple(range(30, 60))
        assert "pack b.extxyz" in finding.fix

    @pytest.mark.parametrize("wrong", [0, 1.0, -2])
    def test_a_distance_that_makes_no_sense(self, wrong: float) -> None:
        with pytest.raises(tm.InputError, match="shortest is"):
            doctor(rattled(2), shortest=wrong)


class TestCommand:
    def test_sound_data_exits_with_zero(self, capsys: pytest.CaptureFixture[str]) -> None:
        cli.main(["doctor", saved(rattled(12)), "--out", "found"])
        assert "nothing wrong" in capsys.readouterr().err
        assert json.loads(Path("found/doctor.json").read_text())["structures"] == 12

    def test_errors_exit_with_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        structures = rattled(12)
        structures[4].info["converged"] = False
        with pytest.raises(SystemExit) as stopped:
            cli.main(["doctor", saved(structures), "--json"])
        printed = capsys.readouterr()
        assert stopped.value.code == 1 and printed.err == ""
        (finding,) = json.loads(printed.out)["findings"]
        assert finding["severity"] == "error" and finding["structures"] == [4]

    def test_a_page_needs_a_folder(self) -> None:
        data = saved(rattled(2))
        with pytest.raises(tm.InputError, match="is a file: choose a folder"):
            doctor(data, out=data)

    def test_bad_input_exits_with_two(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["doctor", "nothing.extxyz"])
        assert stopped.value.code == 2 and "no such file" in capsys.readouterr().err

    def test_what_comes_from_files_stays_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        evil = "<script>alert(1)</script>[bold]"
        steering = "\x1b[2J"
        structures = rattled(12)
        for index, atoms in enumerate(structures):
            atoms.info["level"] = evil + steering if index % 2 else "PBE"
            atoms.info[evil] = float(index) ** 2
        diagnosis = doctor(structures, out="found")
        page = Path("found/doctor.html").read_text()
        assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
        text = io.StringIO()
        show(diagnosis.to_json(), diagnosis.labels, Console(file=text, width=200))
        assert evil in text.getvalue() and steering not in text.getvalue()


def test_one_is_singular() -> None:
    content = {"findings": [], "structures": 2, "atoms": 2, "elements": 1, "seconds": 0}
    assert verdict(content) == "nothing wrong in 2 structures, 2 atoms of 1 element (0.0 s)"


def test_every_number_of_a_large_finding_is_in_the_json() -> None:
    structures = rattled(30)
    for atoms in structures[:20]:
        atoms.info["converged"] = "F"
    diagnosis = doctor(structures, out="found")
    text = io.StringIO()
    show(diagnosis.to_json(), diagnosis.labels, Console(file=text, width=200))
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 more" in text.getvalue()
    content = json.loads(Path("found/doctor.json").read_text())
    assert content["findings"][0]["structures"] == list(range(20))


def test_a_compressed_file_is_read_whole(public_data: Path) -> None:
    path = public_data / "botnet_molecules" / "acac_test_H_transfer.extxyz.xz"
    if path.is_file():
        with lzma.open(path, "rt") as file:
            assert doctor(path).summary["structures"] == file.read().count("Properties")
