"""Labels: every name, place, shape and unit leads to one; what is missing stays missing, what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from transfermium.data import Labelled, Labels, available, isolated_atoms, read, resolve
from transfermium.data.labels import FACTORS, KEYS, VIRIALS, factor
from transfermium.errors import InputError

STRESS = np.array([[1.0, 0.6, 0.5], [0.6, 2.0, 0.4], [0.5, 0.4, 3.0]])
VOIGT = [1.0, 2.0, 3.0, 0.4, 0.5, 0.6]


def nacl(**info: Any) -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.info.update(info)
    return atoms


def computed(**results: Any) -> Atoms:
    atoms = nacl()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def the_label(structures: list[Atoms], quantity: str, **options: Any) -> Any:
    """The label of the first structure, found and converted."""
    labels = resolve(structures, [quantity], **options)
    atoms = labels.apply(structures[0])
    assert atoms.calc is None
    return (atoms.arrays if labels[quantity].per == "atom" else atoms.info)[quantity]


# ------------------------------------------------------------------------------------------------------ finding


@pytest.mark.parametrize("key", KEYS["energy"])
def test_an_energy_is_found_under_any_of_its_names(key: str) -> None:
    assert the_label([nacl(**{key: -3})], "energy") == -3.0
    assert the_label([nacl(**{key: np.array([-3.0])})], "energy") == -3.0


@pytest.mark.parametrize("key", KEYS["forces"])
@pytest.mark.parametrize("place", ["info", "arrays"])
def test_forces_are_found_under_any_of_their_names(key: str, place: str) -> None:
    atoms = nacl()
    getattr(atoms, place)[key] = np.arange(6.0).reshape(2, 3)
    assert the_label([atoms], "forces").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("key", KEYS["stress"])
@pytest.mark.parametrize("value", [VOIGT, STRESS.ravel().tolist(), STRESS])
def test_a_stress_is_found_under_any_name_and_shape(key: str, value: Any) -> None:
    atoms = nacl(**{key: value})
    expected = -STRESS / atoms.get_volume() if key in VIRIALS else STRESS
    np.testing.assert_allclose(the_label([atoms], "stress"), expected)


def test_results_of_a_calculator_are_labels() -> None:
    atoms = computed(energy=-1.5, forces=np.ones((2, 3)), stress=np.array(VOIGT), magmoms=np.array([0.1, 0.2]))
    labels = resolve([atoms], ["energy", "forces", "stress", "magmoms"])
    assert [entry.keys for entry in labels.entries] == [
        (("calc", name, 1),) for name in ("energy", "forces", "stress", "magmoms")
    ]
    assert [entry.per for entry in labels.entries] == ["structure", "atom", "structure", "atom"]
    applied = labels.apply(atoms)
    assert applied.info["stress"].tolist() == STRESS.tolist()
    assert applied.arrays["magmoms"].tolist() == [0.1, 0.2]


def test_the_preferred_key_wins_and_the_others_are_told() -> None:
    atoms = [nacl(energy=1.0, REF_energy=2.0, free_energy=3.0), nacl(free_energy=4.0)]
    labels = resolve(atoms, ["energy"])
    assert [labels.apply(a).info["energy"] for a in atoms] == [2.0, 4.0]
    assert labels["energy"].keys == (("info", "REF_energy", 1), ("info", "free_energy", 1))
    assert labels["energy"].also_found == ("energy (info, 1)", "free_energy (info, 1)")


def test_a_label_names_its_key() -> None:
    atoms = nacl(energy=1.0, e_tot=2.0)
    assert the_label([atoms], "energy", labels={"energy": "e_tot"}) == 2.0
    assert the_label([atoms], "gap", labels={"gap": "e_tot"}) == 2.0


def test_applying_moves_labels_and_touches_nothing_else() -> None:
    atoms = computed(energy=-1.0, forces=np.ones((2, 3)))
    atoms.info.update(REF_energy=-2.0, name="a")
    labels = resolve([atoms], ["energy", "forces"], units={"energy": "Ha"})
    applied = labels.apply(atoms)
    assert applied.info == {"energy": -2.0 * units.Hartree, "name": "a"}
    assert applied.calc is None
    assert atoms.info == {"REF_energy": -2.0, "name": "a"}
    assert atoms.calc is not None
    assert resolve([applied], ["energy"]).apply(applied).info["energy"] == applied.info["energy"]


def test_missing_labels_stay_missing() -> None:
    per_atom = nacl()
    per_atom.arrays["shift"] = np.array([np.nan, 2.0])
    structures = [nacl(gap=1.0), nacl(), nacl(gap=np.nan), nacl(gap=None), nacl(gap="nan"), per_atom]
    labels = resolve(structures, ["gap", "shift"], optional=["energy"])
    assert (labels["gap"].count, labels["gap"].total) == (1, 6)
    assert "energy" not in labels
    assert ["gap" in atoms.info for atoms in Labelled(structures, labels)] == [True, *[False] * 5]
    np.testing.assert_array_equal(labels.apply(per_atom).arrays["shift"], [np.nan, 2.0])
    with pytest.raises(InputError, match="no label 'energy'"):
        labels["energy"]


def test_properties_come_as_found() -> None:
    atoms = nacl(flag=True, tensor=np.eye(3), one=[2], group="4/mmm")
    atoms.arrays["charge"] = np.array([[1], [-1]])
    assert the_label([atoms], "flag") == 1.0
    assert the_label([atoms], "tensor").shape == (3, 3)
    assert the_label([atoms], "one") == 2.0
    assert the_label([atoms], "group") == "4/mmm"
    assert the_label([atoms], "charge").tolist() == [1.0, -1.0]


def test_classes_are_words() -> None:
    structures = [nacl(point_group=value) for value in (1, "-43m", 2.0, "1")]
    labels = resolve(structures, ["point_group"])
    assert labels["point_group"].classes == ("-43m", "1", "2")
    assert labels["point_group"].rms is None
    assert [atoms.info["point_group"] for atoms in Labelled(structures, labels)] == ["1", "-43m", "2", "1"]


def test_what_there_is() -> None:
    atoms = computed(energy=1.0)
    atoms.info["gap"] = 1.0
    there = available([atoms, nacl(gap=2.0, energy=1.0)])
    assert there == {"energy": ("calc+info", 2), "gap": ("info", 2)}
    lone = Atoms("H", info={"config_type": "isolatedatom"})
    assert isolated_atoms([atoms, lone, Atoms("H")]) == [1]


def test_one_pass_is_enough() -> None:
    structures = [nacl(energy=-1.0, gap=2.0), nacl(gap=3.0), nacl()]
    labels = resolve(iter(structures), ["gap"], optional=["energy"])
    assert [(entry.count, entry.total) for entry in labels.entries] == [(2, 3), (1, 3)]
    with pytest.raises(
        InputError, match=r"the 3 structures have energy \(1, per structure\), gap \(2, per structure\);"
    ):
        resolve(iter(structures), ["gap", "band_gap"])


def test_what_is_passed_over_is_told_for_each_structure() -> None:
    first, second = nacl(REF_energy=-1.0, dft_energy=-2.0), computed(energy=-3.0, free_energy=-4.0)
    labels = resolve([first, second], ["energy"])
    assert labels["energy"].passed_over(first) == [("info", "dft_energy")]
    assert labels["energy"].passed_over(second) == [("calc", "free_energy")]
    named = resolve([first], ["energy"], labels={"energy": "dft_energy"})["energy"]
    assert named.passed_over(first) == [("info", "REF_energy")]
    assert named.passed_over(second) == [("calc", "energy"), ("calc", "free_energy")]


def test_the_manifest_shows_and_keeps_everything() -> None:
    structures = [nacl(e=1.0, kind="a"), nacl(e=-3.0), nacl(kind="b", virial=VOIGT)]
    labels = resolve(
        structures, ["energy", "kind", "stress"], labels={"energy": "e"}, units={"energy": "Ry"}, optional=["forces"]
    )
    entry = labels["energy"]
    assert (entry.count, entry.total, entry.unit, entry.given_unit) == (2, 3, "eV", "Ry")
    assert entry.minimum == pytest.approx(-3 * units.Rydberg)
    assert entry.maximum == pytest.approx(units.Rydberg)
    assert entry.rms == pytest.approx(5**0.5 * units.Rydberg)
    assert Labels.from_json(json.loads(json.dumps(labels.to_json()))) == labels

    console = Console(width=200)
    with console.capture() as shown:
        console.print(labels.table())
    for text in ("e (info)", "2 of 3", "Ry → eV", "2 classes: a, b", "stress = -virial/V"):
        assert text in shown.get()


def test_labelled_is_a_lazy_sequence() -> None:
    structures = [nacl(REF_energy=float(i)) for i in range(5)]
    labelled = Labelled(structures, resolve(structures, ["energy"]))
    assert len(labelled) == 5
    assert [labelled[i].info["energy"] for i in (0, -1, np.int64(2))] == [0.0, 4.0, 2.0]
    assert [atoms.info["energy"] for atoms in labelled[1:4:2]] == [1.0, 3.0]
    with pytest.raises(IndexError):
        labelled[5]


# -------------------------------------------------------------------------------------------------------- units


@given(st.sampled_from([(q, u) for q, known in FACTORS.items() for u in known]), st.floats(-1e3, 1e3))
def test_units_go_there_and_back(unit: tuple[str, str], number: float) -> None:
    quantity, name = unit
    scale = factor(quantity, name)
    assert number * scale / scale == pytest.approx(number)
    assert factor(quantity, name.upper()) == factor(quantity, f" {name.lower()}") == scale
    if quantity == "stress":
        assert factor(quantity, f"-{name}") == -scale


@pytest.mark.parametrize(
    ("quantity", "unit", "expected"),
    [
        ("energy", "kcal/mol", 0.0433641),
        ("energy", "kJ/mol", 0.01036427),
        ("energy", "hartree", 27.211386),
        ("energy", "Ry", 13.605693),
        ("forces", "eV/Ang", 1),
        ("forces", "meV/Å", 1e-3),
        ("forces", "hartree/bohr", 51.42207),
        ("forces", "Ry/bohr", 25.71103),
        ("forces", "kcal/mol/A", 0.0433641),
        ("stress", "eV/A^3", 1),
        ("stress", "eV/Å³", 1),
        ("stress", "eV/Angstrom**3", 1),
        ("stress", "GPa", 1 / 160.21766),
        ("stress", "-kbar", -1 / 1602.1766),
        ("stress", "hartree/bohr^3", 183.6315),
        ("gap", "whatever", 1),
    ],
)
def test_units_have_their_textbook_values(quantity: str, unit: str, expected: float) -> None:
    assert factor(quantity, unit) == pytest.approx(expected, rel=1e-5)


def test_energies_per_atom_become_totals() -> None:
    assert the_label([nacl(energy=-3.0)], "energy", units={"energy": "eV/atom"}) == -6.0
    assert the_label([nacl(energy=-3.0)], "energy", units={"energy": "meV/atom"}) == pytest.approx(-6e-3)


def test_pressures_of_vasp_change_their_sign() -> None:
    value = the_label([nacl(stress=VOIGT)], "stress", units={"stress": "-kbar"})
    np.testing.assert_allclose(value, -STRESS * 0.1 * units.GPa)


def test_virials_are_energies() -> None:
    atoms = nacl(virial=STRESS)
    value = the_label([atoms], "stress", units={"stress": "Ha"})
    np.testing.assert_allclose(value, -STRESS * units.Hartree / atoms.get_volume())
    with pytest.raises(InputError, match="a virial is an energy"):
        resolve([atoms], ["stress"], units={"stress": "GPa"})
    with pytest.raises(InputError, match="a stress is a pressure"):
        resolve([nacl(stress=STRESS)], ["stress"], units={"stress": "eV"})


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wanted", "options", "message"),
    [
        (["energy"], {}, r"no structure has 'energy'; the 1 structures have charge \(1, per atom\), gap_pbe"),
        (["gap"], {}, "did you mean gap_pbe"),
        (["gap"], {"labels": {"gap": "gap_bpe"}}, "no structure has 'gap_bpe' for 'gap'.*did you mean gap_pbe"),
        (["gap_pbe"], {"optional": ["x"], "labels": {"x": "y"}}, "no structure has 'y' for 'x'"),
        (["gap_pbe"], {"labels": {"gap_pb": "y"}}, "label 'gap_pb' is not wanted here, only gap_pbe; did you mean"),
        (["gap_pbe"], {"units": {"energy": "eV"}}, "unit 'energy' is not wanted here"),
        (["energy"], {"units": {"energy": "hartre"}}, "unknown unit 'hartre' of energy.*did you mean hartree"),
        (["positions"], {}, "cannot be labels"),
    ],
)
def test_wrong_wishes_are_refused(wanted: list[str], options: dict[str, Any], message: str) -> None:
    atoms = nacl(gap_pbe=1.0)
    atoms.arrays["charge"] = np.ones(2)
    with pytest.raises(InputError, match=message):
        resolve([atoms], wanted, **options)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"energy": np.nan}, "'energy' .info. is not finite"),
        ({"energy": "-1.0*"}, r"'energy' \(info\) is '-1\.0\*', which is no number"),
        ({"energy": [1.0, 2.0]}, "shape .2,., but an energy is one number"),
        ({"forces": np.zeros((3, 3))}, "shape .3, 3., but the forces of 2 atoms"),
        ({"forces": np.full((2, 3), np.inf)}, "not finite"),
        ({"stress": np.zeros(5)}, "a stress is 3 × 3"),
        ({"stress": np.arange(9.0)}, "not symmetric"),
        ({"gap": np.inf}, "infinite"),
        ({"gap": "1.5*"}, "'gap' is the text '1.5\\*' where a number is expected .structure 0 has 1.5."),
        ({"gap": np.ones(3)}, r"per structure with shape \(\) in structure 0, but per structure with shape \(3,\)"),
        ({"gap": {}}, "no number"),
    ],
)
def test_values_that_cannot_be_are_named(info: dict[str, Any], message: str) -> None:
    good = nacl(energy=1.0, forces=np.zeros((2, 3)), stress=np.zeros(6), gap=1.5)
    with pytest.raises(InputError, match=message) as error:
        resolve([good, nacl(**info)], list(info))
    assert "structure 1" in str(error.value)


def test_a_virial_needs_a_volume() -> None:
    with pytest.raises(InputError, match="volume"):
        resolve([Atoms("H", info={"virial": VOIGT})], ["stress"])


# -------------------------------------------------------------------------------------------------- public data


def test_public_crystals(public_data: Path) -> None:
    structures = read(public_data / "mattersim_benchmarks" / "random-TP.extxyz.xz")
    labels = resolve(structures, ["energy", "forces", "stress"])
    assert [entry.count for entry in labels.entries] == [693] * 3
    np.testing.assert_allclose(labels.apply(structures[0]).info["stress"][0, 1], 0.0080192786)


def test_public_properties(public_data: Path) -> None:
    structures = read(public_data / "jarvis_supercon")
    labels = resolve(structures, ["Tc"], labels={"Tc": "Tc_K"}, units={"Tc": "K"})
    assert (labels["Tc"].count, labels["Tc"].total, labels["Tc"].unit) == (616, 1056, "K")
