"""Leaks: copies of a structure are found however they are written, other structures are not."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, graphene, molecule
from ase.spacegroup import crystal as from_spacegroup
from hypothesis import given, settings
from hypothesis import strategies as st

from transfermium.data import leakage as module
from transfermium.data import pack, read
from transfermium.data.leakage import FRAMES, TOLERANCE, fingerprint, leaks, summary, tolerance_for, without
from transfermium.errors import InputError


def graphite() -> Atoms:
    cell = [2.46, 2.46, 6.7, 90, 90, 120]
    sites = [(0, 0, 0.25), (0, 0, 0.75), (1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)]
    return Atoms("C4", scaled_positions=sites, cell=cell, pbc=True)


def perovskite() -> Atoms:
    sites = [(0.5, 0.5, 0.5), (0, 0, 0), (0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5)]
    return Atoms("BaTiO3", scaled_positions=sites, cell=[4.0, 4.0, 4.1], pbc=True)


def quartz() -> Atoms:
    sites = [(0.47, 0, 0), (0.41, 0.27, 0.12)]
    return from_spacegroup(["Si", "O"], sites, spacegroup=152, cellpar=[4.91, 4.91, 5.4, 90, 90, 120])


CRYSTALS = {
    "rocksalt": bulk("MgO", "rocksalt", a=4.21),
    "zincblende": bulk("ZnS", "zincblende", a=5.42),
    "wurtzite": bulk("ZnS", "wurtzite", a=3.82, c=6.26),
    "fcc": bulk("Cu"),
    "diamond": bulk("C", "diamond", a=3.57),
    "graphite": graphite(),
    "perovskite": perovskite(),
    "quartz": quartz(),
}


def turned(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    atoms.rotate(rng.uniform(0, 360), rng.normal(size=3), rotate_cell=True)
    return atoms


def repeated(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    return atoms * rng.integers(1, 4, size=3)


def sheared(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Another cell of the same lattice."""
    cell = atoms.cell.array
    atoms.set_cell(np.array([cell[0], cell[1] + cell[0], cell[2] - 2 * cell[1]]))
    return atoms


def shuffled(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    return atoms[rng.permutation(len(atoms))]


def shifted(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    atoms.positions += rng.uniform(-3, 3, size=3)
    return atoms


def rattled(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
    return atoms


def strained(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    strain = rng.uniform(-0.02, 0.02, size=(3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    return atoms


def expanded(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    atoms.set_cell(atoms.cell.array * rng.uniform(0.95, 1.05), scale_atoms=True)
    return atoms


Change = Callable[[Atoms, np.random.Generator], Atoms]
EXACT: list[Change] = [turned, repeated, sheared, shuffled, shifted, expanded]


def is_leak(one: Atoms, other: Atoms) -> bool:
    return bool(leaks([one], [other]))


# -------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("change", EXACT, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", CRYSTALS)
def test_the_way_a_structure_is_written_does_not_matter(name: str, change: Change) -> None:
    atoms = CRYSTALS[name]
    changed = change(atoms.copy(), np.random.default_rng(0))
    assert np.allclose(fingerprint(changed), fingerprint(atoms), rtol=1e-6)
    assert is_leak(changed, atoms)


@pytest.mark.parametrize("change", [rattled, strained], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", CRYSTALS)
@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_small_changes_are_found(name: str, change: Change, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert is_leak(turned(change(repeated(CRYSTALS[name].copy(), rng), rng), rng), CRYSTALS[name])


@pytest.mark.parametrize(
    "pair",
    [
        (bulk("NaCl", "rocksalt", a=5.64), bulk("NaCl", "zincblende", a=6.1)),
        (bulk("NaCl", "rocksalt", a=5.64), bulk("NaCl", "cesiumchloride", a=3.4)),
        (bulk("NaCl", "zincblende", a=6.1), bulk("NaCl", "cesiumchloride", a=3.4)),
        (bulk("ZnS", "zincblende", a=5.42), bulk("ZnS", "wurtzite", a=3.82, c=6.26)),
        (CRYSTALS["diamond"], CRYSTALS["graphite"]),
        (bulk("Fe", "bcc", a=2.87), bulk("Fe", "fcc", a=3.6)),
        (bulk("Co", "fcc", a=3.54), bulk("Co", "hcp", a=2.51, c=4.07)),
        (CRYSTALS["graphite"], graphene(a=2.46, vacuum=10)),
        (molecule("trans-butane"), molecule("isobutane")),
    ],
    ids=lambda pair: " ".join(str(atoms.symbols) for atoms in pair),
)
def test_polymorphs_and_isomers_are_not_leaks(pair: tuple[Atoms, Atoms]) -> None:
    assert not is_leak(*pair)
    assert not is_leak(*pair[::-1])


def test_other_compositions_are_not_leaks() -> None:
    rocksalt = bulk("NaCl", "rocksalt", a=5.64)
    assert not is_leak(bulk("KCl", "rocksalt", a=5.64), rocksalt)
    swapped = perovskite()
    swapped.symbols = "TiBaO3"  # the same elements, the cations exchanged
    assert not is_leak(swapped, perovskite())


def test_vacuum_does_not_matter() -> None:
    sheet = graphene(a=2.46, vacuum=6)
    sheet.pbc = True
    assert is_leak(graphene(a=2.46, vacuum=15), sheet)
    boxed = molecule("CH3CH2OH", vacuum=8)
    boxed.pbc = True
    assert is_leak(boxed, turned(molecule("CH3CH2OH"), np.random.default_rng(0)))
    assert is_leak(Atoms("O"), Atoms("O", cell=[20, 20, 20], pbc=True))


@pytest.mark.parametrize("name", CRYSTALS)
def test_the_fingerprint_is_continuous(name: str) -> None:
    atoms = CRYSTALS[name] * (2, 1, 1)
    rng = np.random.default_rng(3)
    steps = rng.normal(size=atoms.positions.shape)
    change = []
    for size in (1e-2, 1e-3, 1e-4):
        moved = atoms.copy()
        moved.positions += size * steps
        change.append(np.abs(fingerprint(moved) - fingerprint(atoms)).max())
    assert change[1] < change[0] / 4
    assert change[2] < change[1] / 4


# --------------------------------------------------------------------------------------------------------------- ids


def frames(**info: Sequence[object]) -> list[Atoms]:
    """Structures far apart from each other, of one composition, with these ids."""
    n = max(len(values) for values in info.values())
    result = [bulk("Cu", "fcc", a=3.6) * (2, 2, 2) for _ in range(n)]
    for i, atoms in enumerate(result):
        atoms.positions += np.random.default_rng(i).normal(scale=0.5, size=(8, 3))
        atoms.info |= {key: values[i] for key, values in info.items() if values[i] is not None}
    return result


def test_a_material_and_its_trajectory_leak_whole() -> None:
    ours = frames(
        material_id=["a", "a", None, "b", "c", None],
        traj_id=[None, 1, 1, None, 2, 2],
    )
    theirs = [ours[0].copy()]
    found = leaks(ours, theirs)
    assert [(leak.index, leak.other, leak.by) for leak in found] == [
        (0, 0, "structure"),
        (1, 0, "material_id"),
        (2, 0, "traj_id"),
    ]
    assert found[1].why == "has the material_id a of held-out structure 0"
    assert found[2].why == "has the traj_id 1 of structure 1, which leaks"


def test_ids_of_another_composition_or_key_are_not_the_same() -> None:
    [theirs] = frames(material_id=[7])
    silver = theirs.copy()
    silver.symbols = "Ag8"
    [other_key] = frames(traj_id=[7])
    other_key.positions += np.random.default_rng(9).normal(scale=0.5, size=(8, 3))
    assert leaks([silver, other_key], [theirs]) == []


def test_ids_may_be_numbers_or_words() -> None:
    missing = [float("nan"), "", float("nan")]
    assert leaks(frames(mptrj_traj_id=[None, *missing])[1:], frames(mptrj_traj_id=missing[:1])) == []
    ours, theirs = frames(mptrj_traj_id=[5, 5.0, "5", 6])[1:], frames(mptrj_traj_id=[5])
    assert [(leak.index, leak.by) for leak in leaks(ours, theirs)] == [(0, "mptrj_traj_id"), (1, "mptrj_traj_id")]


# ----------------------------------------------------------------------------------------------------------- whole sets


def test_what_is_kept_and_what_is_said(tmp_path: Path) -> None:
    ours = [bulk("Cu"), bulk("Ag"), bulk("NaCl", "rocksalt", a=5.6), bulk("NaCl", "cesiumchloride", a=3.4), bulk("Au")]
    theirs = [bulk("Fe"), bulk("NaCl", "rocksalt", a=5.7) * (2, 1, 1), bulk("Ag", a=4.2)]
    for source in (ours, pack(ours, tmp_path / "packed", progress=False)):
        kept, found = without(source, theirs)
        assert [str(atoms.symbols) for atoms in kept] == ["Cu", "NaCl", "Au"]
        assert kept.indices.tolist() == [0, 3, 4]  # type: ignore[union-attr]
        assert [(leak.index, leak.other) for leak in found] == [(1, 2), (2, 1)]
        assert found[0].why == "distances differ from held-out structure 2 by 0.0%"
    assert summary(found, len(ours)) == "2 of 5 structures leak (2 by structure)"
    assert summary([], 5) == "none of 5 structures leaks"


def test_only_structures_of_a_held_out_composition_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack([bulk("Cu"), *(bulk("Ag") for _ in range(50))], tmp_path / "packed", progress=False)
    looked_at: list[str] = []

    def seen(atoms: Atoms) -> np.ndarray:
        looked_at.append(str(atoms.symbols))
        return fingerprint(atoms)

    monkeypatch.setattr(module, "fingerprint", seen)
    assert [leak.index for leak in leaks(packed, [bulk("Cu")])] == [0]
    assert looked_at == ["Cu", "Cu"]


def test_progress_is_shown_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, bool]] = []

    def track(items: list[int], title: str, quiet: bool) -> list[int]:
        shown.append((len(items), quiet))
        return items

    monkeypatch.setattr(module, "track", track)
    assert len(leaks([bulk("Cu")] * 4, [bulk("Cu")])) == 4
    assert shown == []
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    assert len(leaks([bulk("Cu")] * 4, [bulk("Cu")], quiet=True)) == 4
    assert shown == [(4, True)]


def test_ids_tell_materials_of_one_composition_apart() -> None:
    """Frames of one of two polymorphs, all like each other, may not go on to train."""

    def frames(structure: str, a: float, name: str, n: int, seed: int) -> list[Atoms]:
        found = [bulk("Si", structure, a=a) * (2, 2, 2) for _ in range(n)]
        for k, atoms in enumerate(found):
            atoms.rattle(0.05, seed=seed + k)
            atoms.info["material_id"] = name
        return found

    pool, tests = frames("diamond", 5.43, "a", 12, 0), frames("diamond", 5.43, "a", 4, 50)
    assert tolerance_for(pool, tests) == FRAMES
    assert len(without(pool, tests, tolerance=FRAMES, quiet=True)[0]) == 12
    both = [*pool, *frames("fcc", 3.9, "b", 8, 99)]
    assert tolerance_for(both, tests) == TOLERANCE
    assert len(without(both, tests, quiet=True)[0]) == 8
    for k, atoms in enumerate([*pool, *tests]):
        atoms.info["system_id"] = f"run {k % 4}"  # of one system
    assert tolerance_for(pool, tests) == FRAMES
    for k, atoms in enumerate([*both, *tests]):
        atoms.info["material_id"] = f"frame {k}"  # tells nothing
    assert tolerance_for(pool, tests) == FRAMES


def test_what_makes_no_sense_is_refused() -> None:
    copper = bulk("Cu")
    twice = Atoms("Cu2", positions=np.zeros((2, 3)), cell=[5, 5, 5], pbc=True)
    with pytest.raises(InputError, match="a tolerance of 0 makes no sense"):
        leaks([copper], [copper], tolerance=0)
    with pytest.raises(InputError, match="held-out structure 0: Cu2 has"):
        leaks([copper], [twice])
    with pytest.raises(InputError, match=r"^structure 1: Cu2 has two atoms at the same place"):
        leaks([copper, twice], [copper])
    with pytest.raises(InputError, match="structure 0 has no atoms"):
        leaks([Atoms()], [copper])
    assert leaks([], [copper]) == leaks([copper], []) == []


# --------------------------------------------------------------------------------------------------------- public data


def test_polymorphs_of_oxides_are_told_apart_whatever_the_functional(public_data: Path) -> None:
    lowest: dict[tuple[str, str, str], Atoms] = {}
    for functional in ("LDA", "PBE", "PBEsol", "AM05"):
        for atoms in read(public_data / "bo2_polymorphs_4xc" / f"{functional}.extxyz.xz"):
            name = (atoms.info["oxide"], atoms.info["polymorph"], functional)
            if name not in lowest or atoms.get_potential_energy() < lowest[name].get_potential_energy():
                lowest[name] = atoms
    names = list(lowest)
    theirs = [name for name in names if name[2] == "PBE"]
    found = leaks([*lowest.values()], [lowest[name] for name in theirs])
    assert [leak.index for leak in found] == list(
        range(len(names))
    )  # each is found, though relaxed by another functional
    assert all(names[leak.index][:2] == theirs[leak.other][:2] for leak in found)  # and as its own polymorph


def test_a_set_that_contains_another_is_seen_to(public_data: Path) -> None:
    """All of matbench_phonons is in phonon_dielectric_mp."""
    ours, theirs = read(public_data / "matbench_phonons"), read(public_data / "phonon_dielectric_mp")
    found = leaks(ours, theirs, quiet=True)
    assert len(found) == len(ours)
    assert {leak.by for leak in found} == {"structure"}
    peaks = [(ours[k.index].info["last_phdos_peak"], theirs[k.other].info["last_phdos_peak"]) for k in found]
    assert np.mean([abs(a - b) < 0.01 for a, b in peaks]) > 0.97  # the others are stackings of one compound
