"""Splits: complete, disjoint, reproducible, and never the same material on two sides."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st

from transfermium.data import Split, by_key, found_split_keys, nested, read, split
from transfermium.errors import InputError

METALS = ["Cu", "Ag", "Au", "Al", "Ni", "Pd", "Pt", "Pb"]


def cells(*formulas: str, **info: Sequence[object]) -> list[Atoms]:
    """A structure per formula; `info` gives a value (or None: no key) for each."""
    structures = [Atoms(formula, positions=np.zeros((len(Atoms(formula)), 3))) for formula in formulas]
    for key, values in info.items():
        for atoms, value in zip(structures, values, strict=True):
            if value is not None:
                atoms.info[key] = value
    return structures


def assert_complete(parts: Split, n: int) -> None:
    """Every structure is on exactly one side, and neither training nor validation is empty."""
    sides = [parts.train, parts.valid] + ([] if parts.test is None else [parts.test])
    assert sorted(np.concatenate(sides).tolist()) == list(range(n))
    assert len(parts.train)
    assert len(parts.valid)


@pytest.mark.parametrize("by", ["auto", "composition", "prototype"])
def test_a_structure_without_atoms_is_named(by):
    structures = [*cells("Cu", "CuAg"), Atoms(), *cells("Au")]
    with pytest.raises(InputError, match="structure 2 has no atoms; remove it"):
        split(structures, by=by)


formulas = st.lists(st.sampled_from([*METALS, "NaCl", "Na2Cl2", "MgO"]), min_size=2, max_size=40)
fractions = st.floats(0.01, 0.9)


# --------------------------------------------------------------------------------------------------------- laws


@given(formulas, fractions, st.integers(0, 5))
def test_a_random_split_has_its_size_and_repeats(names: list[str], fraction: float, seed: int) -> None:
    structures = cells(*names)
    parts = split(structures, fraction, by="random", seed=seed)
    assert_complete(parts, len(names))
    assert len(parts.valid) == min(max(1, np.ceil(fraction * len(names) - 1e-9)), len(names) - 1)
    assert split(structures, fraction, by="random", seed=seed).valid.tolist() == parts.valid.tolist()


@given(formulas, fractions, st.integers(0, 5), st.sampled_from(["auto", "composition", "prototype"]))
def test_groups_are_never_on_both_sides(names: list[str], fraction: float, seed: int, by: str) -> None:
    structures = cells(*names)
    try:
        parts = split(structures, fraction, by=by, seed=seed)
    except InputError as error:
        assert "share one" in str(error) and by != "auto"
        return
    assert_complete(parts, len(names))
    groups = [Atoms(name).symbols.formula.reduce()[0].format("hill") for name in names]
    if by == "prototype":
        groups = [f"{len(Atoms(n))} {len(set(Atoms(n).numbers))}" for n in names]
    if parts.by != "random":
        assert not {groups[i] for i in parts.train} & {groups[i] for i in parts.valid}
        if len(groups) - max(groups.count(g) for g in groups) >= fraction * len(names):
            assert len(parts.valid) >= fraction * len(names) - 1e-9


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=4, max_size=30), fractions)
def test_ids_are_never_on_both_sides(ids: list[object], fraction: float) -> None:
    structures = cells(*[METALS[i % 8] for i in range(len(ids))], mp_id=ids)
    parts = split(structures, fraction)
    assert_complete(parts, len(ids))
    if "mp_id" in parts.by:
        assert not {ids[i] for i in parts.train} & {ids[i] for i in parts.valid} - {None}
    if any(ids) and len(set(ids)) > 1:
        parts = split(structures, fraction, by="mp_id")
        assert not {ids[i] for i in parts.train} & {ids[i] for i in parts.valid} - {None}


@given(st.sets(st.integers(0, 999), min_size=1, max_size=60), st.data())
def test_nested_subsets_are_nested(indices: set[int], data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, len(indices)), min_size=1, max_size=5))
    subsets = nested(sorted(indices), sizes, seed=3)
    assert [len(subset) for subset in subsets] == sizes
    by_size = sorted(subsets, key=len)
    for small, large in pairwise(by_size):
        assert set(small.tolist()) <= set(large.tolist()) <= indices
    assert subsets[0].tolist() == nested(sorted(indices), sizes[:1], seed=3)[0].tolist()


# --------------------------------------------------------------------------------------------------------- auto


def test_auto_says_what_it_does() -> None:
    frames = split(cells(*METALS, *METALS))
    assert (frames.by, frames.groups, len(frames.valid)) == ("composition", 8, 2)
    assert frames.reason.startswith(
        "by composition, as several structures share one: 2 of 16 structures validate, 1 of 8"
    )

    ids = [f"mp-{i % 4}" for i in range(8)]
    assert split(cells(*METALS, material_id=ids)).by == "material_id"
    assert split(cells(*METALS, mp_id=list(range(8)))).by == "random"
    assert split(cells("H2O", "H4O2", "H2O")).reason.startswith("random, as all structures share one composition")
    assert "few to validate" in split(cells(*["H2O"] * 30, "Cu", "Ag")).reason


def test_repeated_cells_are_one_composition_and_renamed_ones_one_prototype() -> None:
    structures = cells("NaCl", "Na2Cl2", "MgO", "KF")
    assert split(structures, by="composition").groups == 3
    assert split(structures, by="prototype").groups == 2
    for atoms, number in zip(structures, (225, 225, 225, 221), strict=True):
        atoms.info["spacegroup"] = number
    assert split(structures, by="prototype").groups == 3


def test_isolated_atoms_stay_in_training() -> None:
    structures = cells(*METALS, "H", "O")
    for atoms in structures[-2:]:
        atoms.info["config_type"] = "IsolatedAtom"
    for seed in range(5):
        parts = split(structures, 0.5, seed=seed)
        assert {8, 9} <= set(parts.train.tolist())
    assert "2 isolated atoms stay in training" in parts.reason


def test_elements_stay_in_training_where_that_is_possible() -> None:
    structures = cells("NaCl", "NaCl", "KCl", "NaF", "KF", "MgO", "MgO")
    for seed in range(10):
        parts = split(structures, 0.2, seed=seed)
        assert not {5, 6} & set(parts.valid.tolist())
    assert "only validation has" in split(cells("Cu", "Cu", "Au", "Au"), 0.2).reason


# -------------------------------------------------------------------------------------------------- by key, files


@pytest.mark.parametrize("seed", range(4))
def test_a_large_group_that_is_enough_needs_no_small_ones(seed: int) -> None:
    """Of 60, 50 and 10 structures twelve are wanted: the 50 alone, not the 10 and then the 60."""
    parts = split(cells(*["H2O"] * 60, *["NaClH2O"] * 50, *["NaClH4O2"] * 10), by="composition", seed=seed)
    assert sorted(parts.valid) == list(range(60, 110))


def test_words_decide_the_sides() -> None:
    structures = cells(*METALS, split=["train", "train", "val", "test", "Train", None, "test", "train"])
    parts = by_key(structures, "split")
    assert [side.tolist() for side in (parts.train, parts.valid, parts.test)] == [[0, 1, 4, 7], [2], [3, 6]]  # type: ignore[union-attr]
    assert "1 structures without it are left out" in parts.reason


def test_a_value_is_the_test_set() -> None:
    structures = cells(*METALS, test_fold=[0, 1, 2, 3] * 2)
    parts = by_key(structures, "test_fold", 0, fraction=0.3)
    assert parts.test is not None
    assert parts.test.tolist() == [0, 4]
    assert_complete(parts, 8)
    assert len(parts.valid) == 2
    assert by_key(structures, "test_fold", "0").test.tolist() == [0, 4]  # type: ignore[union-attr]
    assert found_split_keys(structures) == {"test_fold": [0, 1, 2, 3]}


def test_a_key_may_leave_nothing_to_validate() -> None:
    structures = cells(*METALS, test_fold=[0, 1, 2, 3] * 2)
    parts = by_key(structures, "test_fold", 0, fraction=0)
    assert (parts.train.tolist(), parts.valid.tolist(), parts.total) == ([1, 2, 3, 5, 6, 7], [], 8)
    assert "validat" not in parts.reason


def test_the_training_part_of_a_key_is_split_by_groups() -> None:
    structures = cells(*METALS, split=["train"] * 6 + ["test", None], name=["a", "b", "c"] * 2 + ["a", "b"])
    parts = by_key(structures, "split", by="name", fraction=0.3)
    assert parts.valid.tolist() in ([0, 3], [1, 4], [2, 5])
    assert parts.total == 8
    assert "validation from its training part, by 'name', as asked" in parts.reason


@given(formulas, fractions)
def test_a_saved_split_comes_back(tmp_path_factory: pytest.TempPathFactory, names: list[str], fraction: float) -> None:
    path = tmp_path_factory.mktemp("split") / "split.json"
    parts = split(cells(*names), fraction, by="random")
    parts.save(path)
    back = Split.load(path)
    assert (back.train.tolist(), back.valid.tolist()) == (parts.train.tolist(), parts.valid.tolist())
    assert (back.test, back.by, back.reason, back.groups) == (None, parts.by, parts.reason, parts.groups)
    assert back.total == parts.total == len(names)
    content = json.loads(path.read_text())
    del content["total"]  # as in files of former versions
    path.write_text(json.dumps(content))
    assert Split.load(path).total == 0


# ------------------------------------------------------------------------------------------------------- errors


def test_impossible_splits_are_refused(tmp_path: Path) -> None:
    structures = cells(*METALS, fold=[0, 1] * 4, tensor=[np.eye(3)] * 8)
    for message, attempt in {
        "must lie between": lambda: split(structures, 1.0),
        "1 structures cannot be split": lambda: split([bulk("Cu")]),
        "share one composition": lambda: split([bulk("Cu"), bulk("Cu")], by="composition"),
        "did you mean fold": lambda: split(structures, by="folds"),
        "is no id": lambda: split(structures, by="tensor"),
        "has the values 0, 1, not train": lambda: by_key(structures, "fold"),
        "no structure has fold=7": lambda: by_key(structures, "fold", 7),
        "there are fold, tensor": lambda: by_key(structures, "x"),
        "subset of 9": lambda: nested(range(8), [9]),
        "no such split": lambda: Split.load(tmp_path / "none.json"),
    }.items():
        with pytest.raises(InputError, match=message):
            attempt()
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match="not a split"):
        Split.load(tmp_path / "a.json")


def test_public_data(public_data: Path) -> None:
    structures = read(public_data / "mattersim_benchmarks" / "mptrj-random-1k.extxyz.xz")
    parts = split(structures)
    assert parts.by == "mptrj_traj_id"
    ids = [atoms.info["mptrj_traj_id"] for atoms in structures]
    assert not {ids[i] for i in parts.train} & {ids[i] for i in parts.valid}
    assert 100 <= len(parts.valid) < 130

    phonons = read(public_data / "matbench_phonons")
    folds = by_key(phonons, "test_fold", 0)
    assert len(folds.test) == sum(atoms.info["test_fold"] == 0 for atoms in phonons)  # type: ignore[arg-type]
    assert split(read(public_data / "md17_ethanol")).by == "random"
