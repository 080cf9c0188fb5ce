"""What goes into a packed set comes out again, from any process, or one sentence says why not."""

import importlib
import io
import json
import lzma
import multiprocessing
import pickle
import tracemalloc

import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.spacegroup import Spacegroup, crystal
from ase.units import Hartree
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from transfermium import cli
from transfermium.data import formats, read, resolve, stream
from transfermium.data.pack import PackedSet, is_packed, pack
from transfermium.errors import InputError

pack_module = importlib.import_module("transfermium.data.pack")  # its constants
shard_module = importlib.import_module("transfermium.data.shard")

# --- vocabulary


def labelled(n=3, seed=0, **info):
    """A small random crystal with energy, forces and stress."""
    rng = np.random.default_rng(seed)
    atoms = Atoms(
        rng.integers(1, 90, n), rng.normal(size=(n, 3)), cell=rng.normal(size=(3, 3)), pbc=rng.random(3) < 0.5
    )
    results = {"energy": float(rng.normal()), "forces": rng.normal(size=(n, 3)), "stress": rng.normal(size=6)}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info.update(info)
    return atoms


def assert_same(found, expected):
    """Equal values of equal types, all the way down; NaN equals NaN."""
    if isinstance(expected, np.generic):
        expected = expected.item()
    assert type(found) is type(expected)
    if isinstance(expected, Atoms):
        for name in ("arrays", "info", "pbc"):
            assert_same(getattr(found, name), getattr(expected, name))
        assert_same(found.cell.array, expected.cell.array)
        assert_same(found.get_celldisp(), expected.get_celldisp())
        assert_same([c.todict() for c in found.constraints], [c.todict() for c in expected.constraints])
        assert_same(results(found), results(expected))
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype.newbyteorder("=") and found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected or (found != found and expected != expected)


def results(atoms):
    return atoms.calc.results if atoms.calc is not None else {}


def packed(structures, folder, **options):
    return pack(structures, folder / "set", progress=False, **options)


@pytest.fixture
def three(tmp_path):
    return packed([labelled(n, seed=n) for n in (1, 2, 3)], tmp_path, shard_size=2)


# --- round trip

dtypes = st.sampled_from(["float64", "float32", "int64", "int8", "uint64", "bool", "<U3", ">f8"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
numpy_scalars = st.floats(width=32).map(np.float32) | st.integers(-9, 9).map(np.int64) | st.booleans().map(np.bool_)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
values = st.recursive(
    scalars | numpy_scalars | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = st.sampled_from(["a", "b", "level", "energy", "é\0"]) | st.integers(0, 2)  # few, so that types collide


@st.composite
def structures(draw):
    n = draw(st.integers(0, 4))
    numbers = draw(hnp.arrays(int, n, elements=st.integers(-2, 118) | st.just(70_000)))
    atoms = Atoms(numbers, draw(hnp.arrays(float, (n, 3))), cell=draw(hnp.arrays(float, (3, 3))))
    atoms.pbc = draw(hnp.arrays(bool, 3))
    atoms.info = draw(st.dictionaries(keys, values, max_size=3))
    for name in draw(st.sets(st.sampled_from(["tags", "charge", "labels"]))):
        atoms.arrays[name] = draw(dtypes.flatmap(lambda d: hnp.arrays(d, (n, *draw(hnp.array_shapes(max_side=2))))))
    found = draw(st.dictionaries(st.sampled_from(["energy", "forces", "magmom"]), st.floats() | arrays, max_size=3))
    if found:
        atoms.calc = SinglePointCalculator(Atoms())
        atoms.calc.atoms, atoms.calc.results = None, found
    return atoms


@settings(deadline=None, max_examples=150)
@given(st.lists(structures(), min_size=1, max_size=6), st.integers(1, 4))
def test_structures_come_back_as_they_were(tmp_path_factory, structures, shard_size):
    found = packed(structures, tmp_path_factory.mktemp("any"), shard_size=shard_size)
    assert len(found) == len(structures) and not found.left_out
    for one, other in zip(found, structures, strict=True):
        assert_same(one, other)
    assert found.n_atoms.tolist() == [len(atoms) for atoms in structures]
    for i, atoms in enumerate(structures):
        level = atoms.info.get("level")
        assert found.level(i) == (level if isinstance(level, str) else None)


def test_constraints_and_cell_displacement_come_back(tmp_path):
    atoms = labelled(4)
    atoms.set_constraint([FixAtoms([0, 2])])
    atoms.set_celldisp([0.5, 0.0, 0.25])
    assert_same(packed([atoms], tmp_path)[0], atoms)


def test_a_crystal_keeps_its_space_group(tmp_path):
    atoms = crystal(["Na", "Cl"], [(0, 0, 0), (0.5, 0.5, 0.5)], spacegroup=225, cellpar=[5.64] * 3 + [90] * 3)
    found = packed([atoms], tmp_path)[0]
    assert found.info["spacegroup"] == atoms.info["spacegroup"] == Spacegroup(225)
    assert_same(found.arrays, atoms.arrays)


def test_many_different_keys_share_one_column(tmp_path):
    many = [labelled(1, i, **{f"key{i}": float(i), "everywhere": i}) for i in range(2 * shard_module.MOST_COLUMNS)]
    found = packed(many, tmp_path)
    assert_same(list(found), many)
    assert len(found.header["columns"]) == shard_module.MOST_COLUMNS + 1


def test_large_structures_make_shards_of_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "LARGEST_SHARD", 2000)
    many = [labelled(10, i) for i in range(10)]
    found = packed(many, tmp_path)
    assert len(found.header["shards"]) > 2
    assert_same(list(found), many)


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "MOST_OPEN", 2)
    many = [labelled(1, i) for i in range(5)]
    found = packed(many, tmp_path, shard_size=1)
    assert_same(list(found) + list(found), many + many)
    assert len(found._open) == 2


def test_what_was_read_may_be_changed(three):
    atoms = three[2]
    atoms.positions += 1
    atoms.numbers[:] = 1
    atoms.cell[0] = 2
    atoms.pbc[:] = True
    atoms.calc.results["forces"] += 1
    assert_same(three[2], labelled(3, seed=3))


def test_public_data_come_back(public_data, tmp_path):
    names = ["mattersim_benchmarks/alexandria-random-1k", "matbench_jdft2d/all", "water_pbe0ts/train"]
    files = [file for file in (public_data / f"{name}.extxyz.xz" for name in names) if file.exists()]
    if not files:
        pytest.skip("none of the files is there")
    read = [ase.io.read(io.StringIO(lzma.decompress(f.read_bytes()).decode()), ":200", format="extxyz") for f in files]
    originals = [atoms for some in read for atoms in some]
    assert_same(list(packed(iter(originals), tmp_path, shard_size=150)), originals)


# --- a sequence


def test_indexing_is_that_of_a_list(three):
    whole = list(three)
    for index in (slice(None), slice(1, None), slice(None, None, -1), slice(5, 9), slice(-2, None)):
        assert_same(list(three[index]), whole[index])
    assert_same(three[-1], whole[-1])
    assert_same(three[np.int64(1)], whole[1])
    assert_same(list(three[np.array([2, 0, 2])]), [whole[2], whole[0], whole[2]])
    assert_same(list(three[np.array([True, False, True])]), [whole[0], whole[2]])
    assert_same(list(three[[1, 2]][::-1][1:]), [whole[1]])
    assert len(three[[]]) == 0
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            three[wrong]


def test_a_part_knows_its_own_sizes(three):
    assert three[::-1].n_atoms.tolist() == [3, 2, 1]
    assert three[[0, 2]].n_atoms.tolist() == [1, 3]
    assert three[:0].n_atoms.tolist() == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_read_the_same(three, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    _ = three[0]  # a file is open already, which must not travel
    loader = torch.utils.data.DataLoader(three, None, num_workers=1, collate_fn=_itself, multiprocessing_context=method)
    assert_same(list(loader), list(three))


def _itself(atoms):
    return atoms


def test_a_pickle_holds_no_data(tmp_path):
    big = labelled(1000)
    found = packed([big], tmp_path)
    assert_same(found[0], big)
    text = pickle.dumps(found)
    assert len(text) < 5000
    assert_same(pickle.loads(text)[0], big)


# --- levels, labels, units


def test_one_set_may_hold_several_levels(tmp_path):
    found = packed([labelled(level="PBE"), labelled(), labelled(level="r2SCAN"), labelled(level="PBE")], tmp_path)
    assert [found.level(i) for i in range(4)] == ["PBE", None, "r2SCAN", "PBE"]
    assert found[1:].level(1) == "r2SCAN"
    assert found.levels == {"PBE": 2, "r2SCAN": 1}
    assert "dictionary" in str(found._shard(0).batch.schema.field("level").type)


def test_level_fills_in_where_none_is_stated(tmp_path):
    found = packed([labelled(level="PBE"), labelled()], tmp_path, level="r2SCAN")
    assert [atoms.info["level"] for atoms in found] == ["PBE", "r2SCAN"]


def test_labels_are_put_in_place_and_keep_their_units(tmp_path):
    atoms = labelled(e_ha=1.0, gap_mev=1500.0)
    forces = atoms.get_forces()
    names = {"energy": "e_ha", "gap": "gap_mev"}
    labels = resolve([atoms], [*names], labels=names, units={"energy": "hartree", "gap": "meV"})
    found = packed([atoms], tmp_path, labels=labels)
    assert found[0].info == {"energy": pytest.approx(27.2114, abs=1e-4), "gap": 1500.0}
    assert (found.units["info.energy"], found.units["info.gap"]) == ("eV", "meV")
    assert found._shard(0).batch.schema.field("info.energy").metadata[b"unit"].decode() == "eV"
    assert found.header["labels"] == json.loads(json.dumps(labels.to_json()))
    np.testing.assert_array_equal(found[0].calc.results["forces"], forces)  # kept; but in which unit?
    assert not any(column.startswith("calc.") for column in found.units)


def test_a_label_is_found_again_where_others_had_its_name(tmp_path, capsys):
    atoms = labelled(REF_energy=1.0, own=2.0, energies=7.0)
    atoms.calc.results["free_energy"] = 3.0
    labels = resolve([atoms], ["energy"], labels={"energy": "own"})
    found = pack([atoms] * 2, tmp_path / "set", labels=labels)
    assert resolve(found, ["energy"])["energy"].value(found[0]) == 2.0
    assert found[0].info == {"energy": 2.0, "energies": 7.0}
    assert set(found[0].calc.results) == {"forces", "stress"} and found.units["calc.forces"] == "eV/Å"
    others = ["info['REF_energy']", "calc['energy']", "calc['free_energy']"]
    assert found.left_out == {f"{other} (another energy)": 2 for other in others}
    assert "left out: calc['energy'] (another energy) of 2 structures" in capsys.readouterr().err


def test_nothing_is_claimed_of_what_nobody_declared(tmp_path):
    atoms = labelled(REF_energy=1.0)
    found = packed([atoms], tmp_path)
    assert_same(found[0], atoms)
    assert "info.REF_energy" not in found.units


def test_a_value_that_is_no_label_is_named(tmp_path):
    labels = resolve([labelled(e=1.0)], ["energy"], labels={"energy": "e"})
    with pytest.raises(InputError, match="structure 1: 'e'"):
        packed([labelled(e=1.0), labelled(e=float("inf"))], tmp_path, labels=labels)


def test_results_have_the_units_of_ase(three):
    units = {"positions": "Å", "cell": "Å", "calc.energy": "eV", "calc.forces": "eV/Å", "calc.stress": "eV/Å^3"}
    assert three.units == units
    field = three._shard(0).batch.schema.field("calc.forces")
    assert field.metadata[b"unit"].decode() == "eV/Å"


# --- paths


@pytest.mark.parametrize("ending", ["extxyz.gz", "db", "traj"])
def test_files_are_packed_as_they_are_read(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(formats, "PAGE", 10)
    path = tmp_path / f"many.{ending}"
    ase.io.write(path, [labelled(100, i) for i in range(300)])
    at_once = peak(lambda: packed(list(read(path)), tmp_path / "1", shard_size=10))
    streamed = peak(lambda: packed(path, tmp_path / "2", shard_size=10))
    assert streamed < at_once / 2
    assert_same(list(PackedSet.open(tmp_path / "2" / "set")), list(PackedSet.open(tmp_path / "1" / "set")))


def test_several_paths_are_packed_in_their_order(tmp_path):
    ase.io.write(tmp_path / "a.extxyz", [labelled(seed=0), labelled(seed=1)])
    (tmp_path / "folder").mkdir()
    ase.io.write(tmp_path / "folder" / "POSCAR", ase.io.read(tmp_path / "a.extxyz", 0))
    before = packed([labelled(7)], tmp_path).path
    sources = [tmp_path / "a.extxyz", str(tmp_path / "folder"), before]
    found = pack(sources, tmp_path / "several", progress=False)
    assert [len(atoms) for atoms in found] == [3, 3, 3, 7]
    assert_same(list(found), list(stream(*sources)))
    again = pack(sources, tmp_path / "several", progress=False)
    assert again.path == found.path


def test_what_is_missing_is_said_before_anything_is_packed(tmp_path):
    ase.io.write(tmp_path / "a.extxyz", labelled())
    with pytest.raises(InputError, match=r"b\.extxyz: no such file"):
        packed([tmp_path / "a.extxyz", tmp_path / "b.extxyz"], tmp_path)
    (tmp_path / "b.extxyz").write_text("1\n\nH 0 0 0\n2\n\nH 0 0 0\n")
    with pytest.raises(InputError, match=r"b\.extxyz: structure 1 is cut short"):
        packed([tmp_path / "a.extxyz", tmp_path / "b.extxyz"], tmp_path, shard_size=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.extxyz", "b.extxyz"]


def test_the_command_line_converts_what_is_declared(tmp_path, capsys):
    many = [labelled(2, i, E=float(i), gap=0.5) for i in range(3)]
    ase.io.write(tmp_path / "a.extxyz", many)
    ase.io.write(tmp_path / "b.extxyz", many[0])
    command = ["pack", *(str(tmp_path / f"{name}.extxyz") for name in "ab"), "--out", str(tmp_path / "set")]
    cli.main([*command, "--label", "energy=E", "gap=gap", "--unit", "energy=hartree", "--unit", "gap=eV"])
    found = PackedSet.open(tmp_path / "set")
    assert [atoms.info["energy"] / Hartree for atoms in found] == pytest.approx([0, 1, 2, 0])
    assert (found.units["info.energy"], found.units["info.gap"]) == ("eV", "eV")
    assert found.header["labels"]["labels"][0]["count"] == 4
    assert "hartree" in capsys.readouterr().err

    for wrong, message in {
        "label energy=e": "did you mean E",
        "unit energy=hart": "unknown unit",
        "label e": "NAME=KEY",
    }.items():
        option, pair = wrong.split()
        with pytest.raises(SystemExit):
            cli.main([*command, f"--{option}", pair])
        assert message in capsys.readouterr().err


def test_the_command_line_leaves_the_rest_as_it_is(tmp_path):
    ase.io.write(tmp_path / "a.extxyz", labelled(REF_energy=1.0))
    cli.main(["pack", str(tmp_path / "a.extxyz"), "--out", str(tmp_path / "set"), "--level", "PBE"])
    (found,) = PackedSet.open(tmp_path / "set")
    assert found.info == {"REF_energy": 1.0, "level": "PBE"}
    assert set(found.calc.results) == {"energy", "forces", "stress"}


def peak(work):
    """Most bytes that some work held at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- what cannot be stored is counted


def test_objects_are_left_out_and_counted(tmp_path, capsys):
    many = [labelled(note=object()), labelled(note=object()), labelled(note="text")]
    found = pack(many, tmp_path / "set")
    assert found.left_out == {"info['note'] (a object)": 2}
    assert "note" not in found[0].info and found[2].info["note"] == "text"
    assert "left out: info['note'] (a object) of 2 structures" in capsys.readouterr().err


def test_results_of_other_positions_are_left_out(tmp_path):
    moved = labelled()
    moved.positions += 0.1
    found = packed([moved], tmp_path)
    assert found[0].calc is None
    assert sorted(found.left_out) == [
        f"calc['{key}'] (results of other positions)" for key in ("energy", "forces", "stress")
    ]


# --- the folder


def test_the_same_again_is_kept(tmp_path):
    many = [labelled(seed=i) for i in range(5)]
    found = packed(many, tmp_path, shard_size=2)
    before = {file: file.stat().st_mtime_ns for file in found.path.iterdir()}
    again = packed(iter(many), tmp_path, shard_size=2)
    assert again.path == found.path and len(again) == 5
    assert {file: file.stat().st_mtime_ns for file in found.path.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("change", ["fewer", "more", "other", "shards", "level"])
def test_something_else_is_refused(tmp_path, change):
    many = [labelled(seed=i) for i in range(5)]
    packed(many, tmp_path, shard_size=2)
    other = {"fewer": many[:4], "more": [*many, labelled()], "other": many[::-1]}.get(change, many)
    options = {"shard_size": 3 if change == "shards" else 2, "level": "PBE" if change == "level" else None}
    for source in (other, iter(other)):
        with pytest.raises(InputError, match="choose another path"):
            packed(source, tmp_path, **options)
    assert_same(list(PackedSet.open(tmp_path / "set")), many)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("what", ["file", "folder", "other marker"])
def test_foreign_paths_are_never_touched(tmp_path, what):
    path = tmp_path / "set"
    if what == "file":
        path.write_text("mine")
    else:
        path.mkdir()
    if what == "other marker":
        (path / "transfermium.json").write_text('{"format": "transfermium.run"}')
    assert not is_packed(path)
    with pytest.raises(InputError, match="will not be overwritten"):
        packed([labelled()], tmp_path)


def test_an_interrupted_pack_leaves_nothing(tmp_path):
    def source():
        yield from (labelled(seed=i) for i in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(source(), tmp_path, shard_size=1)
    assert list(tmp_path.iterdir()) == []


def test_only_structures_are_packed(tmp_path):
    with pytest.raises(InputError, match="structure 1 is a str"):
        packed([labelled(), "H2O"], tmp_path)
    with pytest.raises(InputError, match="no structures"):
        packed([], tmp_path)
    with pytest.raises(InputError, match="shard_size"):
        packed([labelled()], tmp_path, shard_size=0)


def test_open_says_what_is_wrong(three, tmp_path):
    assert is_packed(three.path) and not is_packed(tmp_path)
    with pytest.raises(InputError, match="not a packed set"):
        PackedSet.open(tmp_path)
    marker = three.path / "transfermium.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "version": 99}))
    with pytest.raises(InputError, match="newer"):
        PackedSet.open(three.path)


def test_a_shard_cut_short_is_named(three):
    shard = three.path / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"shard-00001\.arrow has .* bytes"):
        PackedSet.open(three.path)
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-00001\.arrow is missing"):
        PackedSet.open(three.path)


def test_a_damaged_shard_is_named(three):
    shard = three.path / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[-200:] = bytes(200)
    shard.write_bytes(content)
    found = PackedSet.open(three.path)
    with pytest.raises(InputError, match=r"shard-00000\.arrow is damaged"):
        found[0]
    with pytest.raises(InputError, match=r"shard-00000\.arrow is damaged"):
        found.verify()
    assert_same(found[2], labelled(3, seed=3))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damage_anywhere_gives_a_structure_or_a_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    path = packed([labelled(2, seed=i, note="x" * i) for i in range(4)] + [labelled(note=1)], folder).path
    shard = path / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    shard.write_bytes(content)
    found = PackedSet.open(path)
    with pytest.raises(InputError, match="damaged"):
        found.verify()
    for i in range(5):
        try:
            assert isinstance(found[i], Atoms)
        except InputError as error:
            assert "is damaged" in str(error)
