"""Values of one set beside those of another, by id."""

from __future__ import annotations

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.alloys import QUICK, alloys, painn
from transfermium.data import joined

SHIFT = {29: -3.5, 79: 2.25}  # eV per atom, by which the cheap method differs


def expensive(n: int = 16) -> list[ase.Atoms]:
    structures = alloys(n)
    for k, atoms in enumerate(structures):
        atoms.info |= {"material_id": f"m{k}", "e_high": atoms.get_potential_energy()}
    return structures


def cheap(n: int = 16) -> list[ase.Atoms]:
    """The same materials in another order, with energies that differ by a number for each element."""
    structures = []
    for k, atoms in enumerate(expensive(n)):
        bare = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True, info={"material_id": f"m{k}"})
        bare.calc = SinglePointCalculator(bare, energy=atoms.info["e_high"] + sum(SHIFT[z] for z in atoms.numbers))
        bare.info["gap_low"] = 0.5 * atoms.info["gap"]
        structures.append(bare)
    return [structures[k] for k in np.random.default_rng(0).permutation(n)]


def energies(structures: list[ase.Atoms], name: str) -> np.ndarray:
    return np.array([atoms.info[name] for atoms in structures])


def test_values_come_to_their_own_material():
    found = joined(expensive(), cheap(), {"e_low": "energy", "gap_low": "gap_low"})
    atoms_of = np.array([[(a.numbers == z).sum() for z in SHIFT] for a in found])
    fitted, residual, *_ = np.linalg.lstsq(atoms_of, energies(found, "e_low") - energies(found, "e_high"), rcond=None)
    assert fitted == pytest.approx(list(SHIFT.values()), abs=1e-9) and residual < 1e-18
    assert energies(found, "gap_low") == pytest.approx(0.5 * energies(found, "gap"), rel=1e-12)


def test_what_is_learned_from_them_begins_with_the_difference_of_each_element():
    found = joined(expensive(), cheap(), {"e_low": "energy"})
    objective = tm.Property("e_high", "extensive", minus="e_low")
    model = tm.pretrain(found, objective, painn(), steps=0, valid_fraction=0, **QUICK)
    added = model.heads["e_high_minus_e_low"].shift[list(SHIFT)]
    assert added.tolist() == pytest.approx([-shift for shift in SHIFT.values()], abs=1e-3)


def test_copies_keep_what_they_had_and_the_given_ones_stay():
    structures, others = expensive(4), cheap(4)
    found = joined(structures, others, {"e_low": "energy"})
    assert all("e_low" not in atoms.info for atoms in (*structures, *others))
    for atoms, before in zip(found, structures, strict=True):
        assert atoms == before and atoms.info.keys() - before.info.keys() == {"e_low"}
        assert atoms.get_potential_energy() == before.get_potential_energy()
        assert np.array_equal(atoms.get_forces(), before.get_forces())


def test_files_do_as_well_and_numbers_are_ids(tmp_path):
    structures, others = expensive(4), cheap(4)
    for atoms in (*structures, *others):
        atoms.info["material_id"] = int(atoms.info["material_id"][1:])
    for atoms in others:
        atoms.info["material_id"] = str(atoms.info["material_id"])
    for name, some in (("high", structures), ("low", others)):
        ase.io.write(tmp_path / f"{name}.extxyz", some)
    found = joined(str(tmp_path / "high.extxyz"), tmp_path / "low.extxyz", {"e_low": "energy"})
    in_memory = joined(structures, others, {"e_low": "energy"})
    assert energies(found, "e_low") == pytest.approx(energies(in_memory, "e_low"))


def test_equal_values_of_one_id_are_one():
    others = cheap(4)
    assert len(joined(expensive(4), [*others, *others], {"e_low": "energy"})) == 4


def test_structures_without_partner_can_be_dropped():
    found = joined(expensive(6), [a for a in cheap(6) if a.info["material_id"] not in ("m1", "m4")],
                   {"e_low": "energy"}, missing="drop")  # fmt: skip
    assert [atoms.info["material_id"] for atoms in found] == ["m0", "m2", "m3", "m5"]


def changed(structures: list[ase.Atoms], own: str, **info) -> list[ase.Atoms]:
    (atoms,) = (a for a in structures if a.info["material_id"] == own)
    atoms.info |= info
    return structures


def supercell(structures: list[ase.Atoms]) -> list[ase.Atoms]:
    twice = structures[0].repeat((2, 1, 1))
    twice.info = structures[0].info | {"energy": 2.0 * structures[0].get_potential_energy()}
    return [twice, *structures[1:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b: {"structures": changed(a, "m2", material_id=None)},
         "structure 2 of the structures has no 'material_id': give it one"),
        (lambda a, b: {"cheap": changed(b, "m2", material_id="")},
         r"structure \d of the cheap ones has no 'material_id'"),
        (lambda a, b: {"cheap": [*b, *changed(cheap(8), "m3", gap_low=7.5)], "labels": {"low": "gap_low"}},
         r"material_id m3 has several values of 'gap_low' in the cheap structures, .* and 7.5"),
        (lambda a, b: {"labels": {"gap": "gap_low"}}, "structure 0 has a 'gap' already: choose another name"),
        (lambda a, b: {"labels": {"dft_energy": "energy"}}, "'dft_energy' cannot be a new name, .* the energy itself"),
        (lambda a, b: {"labels": {"positions": "energy"}}, "'positions' cannot be a new name"),
        (lambda a, b: {"cheap": [x for x in b if x.info["material_id"] in ("m0", "m5")]},
         r"6 of 8 structures have no energy in the cheap .* material_id \(m1, m2, m3, m4, m6 and 1 more\)"),
        (lambda a, b: {"cheap": changed(b, "m6", gap_low=float("nan")), "labels": {"low": "gap_low"}},
         r"1 of 8 structures have no gap_low .* \(m6\): .* missing='drop'"),
        (lambda a, b: {"cheap": supercell(b)},
         r"structure \d is .*, but structure 0 of the cheap ones is .* under material_id m"),
        (lambda a, b: {"labels": {"low": "gap_lwo"}}, "no cheap structure has 'gap_lwo' in info; there are .*gap_low"),
        (lambda a, b: {"labels": {}}, "nothing to join"),
        (lambda a, b: {"missing": "ignore"}, "missing is 'ignore', but must be 'refuse' or 'drop'"),
        (lambda a, b: {"structures": changed(a[:1], "m0", material_id="x"), "missing": "drop"},
         "1 of 1 structures have no energy"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_refused(change, words):
    arguments = {"structures": expensive(8), "cheap": cheap(8), "labels": {"e_low": "energy"}}
    arguments |= change(arguments["structures"], arguments["cheap"])
    with pytest.raises(tm.InputError, match=words):
        joined(**arguments)
