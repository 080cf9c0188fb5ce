"""Reading: whatever the format, the structures come back as they were written; whatever is wrong is named."""

import bz2
import gzip
import json
import lzma
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given
from hypothesis import strategies as st

from transfermium.data import Joined, Labelled, Subset, available, formats, original, read, resolve, stream
from transfermium.data.formats import COMPRESSIONS
from transfermium.errors import InputError

OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def labelled(n: int) -> list[Atoms]:
    """Rattled copies of NaCl with an energy, forces, a stress and a band gap."""
    frames = []
    for i in range(n):
        rng = np.random.default_rng(i)
        atoms = bulk("NaCl", "rocksalt", a=5.6)
        atoms.rattle(0.05, seed=i)
        atoms.info["band_gap"] = float(rng.uniform(4, 6))
        atoms.calc = SinglePointCalculator(
            atoms, energy=float(rng.normal()), forces=rng.normal(size=(2, 3)), stress=rng.normal(size=6)
        )
        frames.append(atoms)
    return frames


def write_xyz(path: Path, frames: list[Atoms]) -> Path:
    ase.io.write(path.with_suffix("") if path.suffix in COMPRESSIONS else path, frames, format="extxyz")
    if path.suffix in COMPRESSIONS:
        plain = path.with_suffix("")
        with OPENERS[path.suffix](path, "wb") as file:
            file.write(plain.read_bytes())
        plain.unlink()
    return path


def assert_same(a: Atoms, b: Atoms) -> None:
    assert a.numbers.tolist() == b.numbers.tolist()
    assert a.pbc.tolist() == b.pbc.tolist()
    np.testing.assert_allclose(a.positions, b.positions, atol=1e-7)
    np.testing.assert_allclose(a.cell.array, b.cell.array, atol=1e-7)


def pymatgen(atoms: Atoms, **species: Any) -> dict[str, Any]:
    """A structure as pymatgen writes it."""
    sites = [
        {
            "species": [{"element": symbol, "occu": 1, **species}],
            "abc": abc.tolist(),
            "xyz": xyz.tolist(),
            "properties": {"magmom": 0.5},
            "label": symbol,
        }
        for symbol, abc, xyz in zip(
            atoms.get_chemical_symbols(), atoms.get_scaled_positions(), atoms.positions, strict=True
        )
    ]
    lattice = {"matrix": atoms.cell.tolist(), "pbc": [True, True, True], "a": 1.0}
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": 0,
        "lattice": lattice,
        "sites": sites,
    }


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("ending", OPENERS)
def test_compression_changes_nothing(tmp_path: Path, ending: str) -> None:
    frames = labelled(3)
    back = read(write_xyz(tmp_path / f"a.extxyz{ending}", frames))
    assert len(back) == 3
    for a, b in zip(frames, back, strict=True):
        assert_same(a, b)
        np.testing.assert_allclose(a.get_forces(), b.get_forces(), atol=1e-7)
        np.testing.assert_allclose(a.get_stress(), b.get_stress(), atol=1e-7)
        assert b.info == pytest.approx(a.info)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.sampled_from(sorted(OPENERS)), st.booleans())
def test_any_frames_survive_any_compression(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], ending: str, gaps: bool
) -> None:
    rng = np.random.default_rng(sum(sizes))
    frames = [Atoms(rng.integers(1, 90, n), positions=rng.normal(size=(n, 3))) for n in sizes]
    path = write_xyz(tmp_path_factory.mktemp("xyz") / f"a.xyz{ending}", frames)
    if gaps:  # ASE would stop at the first blank line
        with OPENERS[ending](path, "at") as file:
            file.write("\n\n2\n\nH 0 0 0\nH 0 0 1\n\n")
    back = read(path)
    assert [len(atoms) for atoms in back] == sizes + [2] * gaps
    for a, b in zip(frames, back, strict=False):
        assert_same(a, b)


def test_anything_ase_reads(tmp_path: Path) -> None:
    frames = labelled(2)
    ase.io.write(tmp_path / "a.traj", frames)
    ase.io.write(tmp_path / "POSCAR", frames[0])
    (tmp_path / "POSCAR.gz").write_bytes(gzip.compress((tmp_path / "POSCAR").read_bytes()))
    assert [atoms.get_potential_energy() for atoms in read(tmp_path / "a.traj")] == [
        atoms.get_potential_energy() for atoms in frames
    ]
    assert_same(read(tmp_path / "POSCAR")[0], frames[0])
    assert_same(read(tmp_path / "POSCAR.gz")[0], frames[0])


@pytest.mark.parametrize("name", ["a.db", "a.json", "a.db.xz"])
def test_ase_databases_bring_their_values(tmp_path: Path, name: str) -> None:
    frames = labelled(2)
    plain = tmp_path / name.removesuffix(".xz")
    with ase.db.connect(str(plain)) as database:
        for i, atoms in enumerate(frames):
            database.write(atoms, gap=1.5 + i, data={"eps": np.eye(3)})
    if name.endswith(".xz"):
        (tmp_path / name).write_bytes(lzma.compress(plain.read_bytes()))
    back = read(tmp_path / name)
    assert [atoms.info["gap"] for atoms in back] == [1.5, 2.5]
    assert np.asarray(back[0].info["eps"]).tolist() == np.eye(3).tolist()
    assert back[1].get_potential_energy() == pytest.approx(frames[1].get_potential_energy())


def test_json_of_pymatgen_structures(tmp_path: Path) -> None:
    frames = labelled(2)
    dicts = [pymatgen(atoms) for atoms in frames]
    contents = [
        dicts,
        {"structures": dicts},
        [{"structure": d, "gap": 1.0, "id": "a"} for d in dicts],
        {"structures": [{"structure": d} for d in dicts]},
    ]
    for i, content in enumerate(contents):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(content))
        for a, b in zip(frames, read(path), strict=True):
            a.wrap()
            b.wrap()
            assert_same(a, b)
            assert b.arrays["magmom"].tolist() == [0.5, 0.5]
    assert read(tmp_path / "2.json")[0].info == {"gap": 1.0, "id": "a"}
    (tmp_path / "one.json").write_text(json.dumps(dicts[0]))
    assert len(read(tmp_path / "one.json")) == 1


def test_matbench_tables(tmp_path: Path) -> None:
    frames = labelled(2)
    table = {
        "index": ["mb-jdft2d-001", "mb-jdft2d-002"],
        "columns": ["structure", "exfoliation_en"],
        "data": [[pymatgen(frames[0]), 63.5], [pymatgen(frames[1]), None]],
    }
    path = tmp_path / "matbench_jdft2d.json.gz"
    path.write_bytes(gzip.compress(json.dumps(table).encode()))
    back = read(path)
    assert [atoms.info for atoms in back] == [
        {"mbid": "mb-jdft2d-001", "exfoliation_en": 63.5},
        {"mbid": "mb-jdft2d-002"},
    ]


def test_disorder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([pymatgen(bulk("Si")), pymatgen(bulk("Si"), occu=0.5)]))
    with pytest.raises(InputError, match=r"a\.json: structure 1, site 0 is disordered"):
        read(tmp_path / "a.json")

    cif = """data_a
_cell_length_a 4
_cell_length_b 4
_cell_length_c 4
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Cu 0 0 0 0.5
Au 0 0 0 0.5
"""
    (tmp_path / "a.cif").write_text(cif)
    with pytest.raises(InputError, match=r"a\.cif: structure 0 has a disordered site"):
        read(tmp_path / "a.cif")
    (tmp_path / "b.cif").write_text(
        cif.replace("Au 0 0 0 0.5", "Au 0.5 0.5 0.5 1").replace("Cu 0 0 0 0.5", "Cu 0 0 0 1")
    )
    assert read(tmp_path / "b.cif")[0].info == {"spacegroup": 1}


# ------------------------------------------------------------------------------------------------------ sources


def test_sources_are_joined_in_their_order(tmp_path: Path) -> None:
    frames = labelled(5)
    first = write_xyz(tmp_path / "a.xyz", frames[:2])
    joined = read([str(first), frames[2:4]], frames[4])
    assert isinstance(joined, Joined)
    assert len(joined) == 5
    for a, b in zip(frames, joined, strict=True):
        assert_same(a, b)
    assert_same(joined[np.int64(-1)], frames[4])
    assert [len(joined[1:4]), len(joined[::-1]), len(joined[3:2])] == [3, 5, 0]
    assert_same(joined[::-1][0], frames[4])
    assert_same(pickle.loads(pickle.dumps(joined))[2], frames[2])
    assert_same(Subset(joined, np.array([3, 1]))[1], frames[1])
    with pytest.raises(IndexError):
        joined[5]
    assert "a.xyz: 2" in repr(joined)


def test_a_folder_of_files_is_read_in_order(tmp_path: Path) -> None:
    frames = labelled(3)
    write_xyz(tmp_path / "b.extxyz.xz", frames[1:])
    write_xyz(tmp_path / "a.xyz", frames[:1])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "about.json").write_text("{}")
    back = read(tmp_path)
    assert isinstance(back, Joined)
    assert list(back.names) == ["a.xyz", "b.extxyz.xz"]
    for a, b in zip(frames, back, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", ["a.extxyz", "a.extxyz.bz2", "a.db", "a.traj", "a.traj.gz"])
def test_a_stream_gives_what_read_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(formats, "PAGE", 2)
    frames = labelled(5)
    plain = tmp_path / name.removesuffix(".gz")
    if "xyz" in name:
        write_xyz(plain, frames)
    else:
        ase.io.write(plain, frames)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    streamed = stream(tmp_path / name, frames[:1])
    assert iter(streamed) is streamed
    for a, b, c in zip([*frames, frames[0]], read(tmp_path / name, frames[:1]), streamed, strict=True):
        assert_same(a, c)
        assert available([b]) == available([c])
        np.testing.assert_array_equal(b.get_forces(), c.get_forces())


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text("1\n\nH 0 0 0\n1\n\nH 0 0 nan\n")
    structures = stream(path)
    assert len(next(structures)) == 1
    with pytest.raises(InputError, match=r"a\.xyz: structure 1: the position of atom 0 is not finite"):
        next(structures)


def test_a_stream_takes_every_source_and_misses_none(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    folder(files, "id,gap\na,1\nb,2\nc,3\n")
    table = tmp_path / "table.csv"
    (files / "values.csv").rename(table)
    assert [atoms.info["gap"] for atoms in stream(files, csv=table)] == [1, 2, 3]
    assert [len(atoms) for atoms in stream([labelled(1), files])] == [2, 1, 1, 1]
    for message, sources in {"nothing to read": [], "no such file": [files, tmp_path / "b.xyz"]}.items():
        with pytest.raises(InputError, match=message):
            stream(*sources)
    with pytest.raises(InputError, match="belongs to a folder"):
        stream(files / "a.cif", csv=table)


def test_the_original_index_is_found_below_subsets_and_labels(tmp_path: Path) -> None:
    frames = read(labelled(2), labelled(8))
    some = Subset(frames, [9, 7, 5, 3, 1])
    ready = Subset(Labelled(some[1:], resolve(some, ["band_gap"])), np.array([3, 0]))
    assert [original(ready, i) for i in range(2)] == [1, 7]
    assert original(frames, 4) == original(list(frames), 4) == 4
    assert_same(ready[1], frames[original(ready, 1)])


def test_a_packed_set_stays_on_disk(tmp_path: Path) -> None:
    pack = pytest.importorskip("transfermium.data.pack")
    frames = labelled(3)
    pack.pack(frames, tmp_path / "packed", progress=False)
    back = read(tmp_path / "packed")
    assert isinstance(back, pack.PackedSet)
    assert_same(back[2], frames[2])
    both = read(tmp_path / "packed", frames)
    assert len(both) == 6
    assert_same(both[5], frames[2])


# ------------------------------------------------------------------------------------------- folder with a table


def folder(tmp_path: Path, table: str, name: str = "values.csv") -> Path:
    """Three CIF or POSCAR files beside a table."""
    for i, file in enumerate(["a.cif", "b.cif", "POSCAR_c"]):
        ase.io.write(tmp_path / file, bulk("Cu", a=3.6 + 0.1 * i), format="cif" if "cif" in file else "vasp")
    (tmp_path / name).write_text(table)
    return tmp_path


@pytest.mark.parametrize(
    "table",
    [
        "id,gap,kind,icsd_id\nb,1.5,metal,17\na.cif,,metal,18\nc,3,,19\n",
        "\ufeffid;gap;kind;icsd_id\r\nb;1.5;metal;17\r\na;nan;metal;18\r\nPOSCAR_c;3;;19\r\n",
        "gap\tfilename\tkind\ticsd_id\n1.5\tcifs/b.cif\tmetal\t17\n\ta.cif\tmetal\t18\n3\tPOSCAR_c\t\t19\n",
    ],
)
def test_a_table_gives_values_to_the_files_it_names(tmp_path: Path, table: str) -> None:
    back = read(folder(tmp_path, table))
    assert [atoms.info.get("gap") for atoms in back] == [1.5, None, 3.0]
    assert [atoms.info.get("kind") for atoms in back] == ["metal", "metal", None]
    assert [atoms.info["icsd_id"] for atoms in back] == ["17", "18", "19"]
    np.testing.assert_allclose([atoms.get_volume() * 4 for atoms in back], [3.7**3, 3.6**3, 3.8**3])


def test_a_table_of_cgcnn_has_no_header(tmp_path: Path) -> None:
    path = folder(tmp_path, "a,1.0\nb,2.0\nc,3.0\n", "id_prop.csv")
    (path / "atom_init.json").write_text("{}")
    assert [(atoms.info["id"], atoms.info["target"]) for atoms in read(path)] == [("a", 1.0), ("b", 2.0), ("c", 3.0)]


def test_a_table_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    folder(tmp_path / "files", "x,y\n", "other.csv")
    (tmp_path / "gaps.csv").write_text("id,gap\na,1\nb,2\nc,3\n")
    assert [atoms.info["gap"] for atoms in read(tmp_path / "files", csv=tmp_path / "gaps.csv")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,gap\na,1\nb,2\nz,3\nc,3\n", "1 rows without a structure file .z."),
        ("id,gap\na,1\n", r"2 structure files without a row \(POSCAR_c, b\.cif\)"),
        ("id,gap\nx,1\ny,2\n", "none of its 2 rows names a structure file"),
        ("id,gap\na,1\nb,2\nc,3\na.cif,4\n", r"rows 1 and 4 both name a\.cif"),
        ("id,gap\na,1\nb\nc,3\n", "row 2 has 1 cells for 2 columns"),
        ("id,gap,gap\na,1,1\nb,2,2\nc,3,3\n", "a name of its own"),
        ("", "empty"),
        ("id,gap\n", "no rows"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(folder(tmp_path, table))
    assert "values.csv" in str(error.value)


def test_two_tables_need_a_choice(tmp_path: Path) -> None:
    path = folder(tmp_path, "id,gap\na,1\nb,2\nc,3\n")
    (path / "more.csv").write_text("id,gap\n")
    with pytest.raises(InputError, match=r"2 CSV files \(more\.csv, values\.csv\); leave one CSV file in the folder"):
        read(path)
    assert len(read(path, csv=path / "values.csv")) == 3


# ------------------------------------------------------------------------------------------------------- errors


def test_a_missing_file_names_what_is_near(tmp_path: Path) -> None:
    write_xyz(tmp_path / "water_train.xyz", labelled(1))
    with pytest.raises(InputError, match=r"did you mean water_train\.xyz"):
        read(tmp_path / "water_tain.xyz")
    with pytest.raises(InputError, match="'nowhere' is not in"):
        read(tmp_path / "nowhere" / "a.xyz")


@pytest.mark.parametrize("ending", OPENERS)
def test_an_empty_file_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.xyz{ending}"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        read(path)
    with OPENERS[ending](path, "wt") as file:
        file.write("\n")
    with pytest.raises(InputError, match="no structures"):
        read(path)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("name", ["a.xyz", "a.traj"])
def test_a_truncated_compressed_file_is_refused(tmp_path: Path, name: str, ending: str) -> None:
    plain = tmp_path / name
    ase.io.write(plain, labelled(20), format="extxyz" if name == "a.xyz" else "traj")
    path = tmp_path / f"{name}{ending}"
    with OPENERS[ending](path, "wb") as file:
        file.write(plain.read_bytes())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="cut short") as error:
        read(path)
    assert path.name in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n\nH 0 0 0\n2\n\nH 0 0 0\n", r"structure 1 is cut short"),
        ("1\n\nH 0 0 0\n1\n\nH 0 0 z\n", r"structure 1 cannot be read"),
        ("1\n\nH 0 0 0\n1\n\nQq 0 0 0\n", r"structure 1 cannot be read"),
        ("2\n\nH 0 0 0\n1\n\nH 0 0 0\n", r"structure 0 cannot be read"),
        ("1\n\nD 0 0 0\n", r"structure 0 has the element 'D', which is hydrogen here: write H, .* column masses"),
        ("1\n\nH 0 0 0\nH 0 0 1\n", r"structure 1 should begin with its number of atoms"),
        ("1\n\nH 0 0 nan\n", "the position of atom 0 is not finite"),
        ("1\n\nH 0 0 0\n0\n\n", "structure 1 has no atoms"),
        ('1\npbc="T T T"\nH 0 0 0\n', "structure 0 is periodic but its cell has no volume"),
        ('1\nLattice="1 0 0 0 1 0 1 1 0"\nH 0 0 0\n', "no volume"),
        ("1\n\nX 0 0 0\n", "atom 0 has no element"),
    ],
)
def test_a_senseless_structure_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("header", "pbc"),
    [
        ('pbc="T T F"', [True, True, False]),
        ("pbc='T T F'", [True, True, False]),
        ("pbc={T T F}", [True, True, False]),
        ("pbc=[1, 1, 0]", [True, True, False]),
        ("pbc=F", [False] * 3),
        ('note="made with pbc=on" pbc="T T F"', [True, True, False]),
        *[(f'pbc="{text}"', None) for text in ("[T, T, F]", "[False, False, False]", "f f f", "t t f", "f", "2 0 0")],
        ('pbc="T T F" pbc="on"', None),
        ('pbc=""', None),
    ],
)
def test_pbc_is_what_it_says_or_refused(tmp_path: Path, header: str, pbc: list[bool] | None) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(f'1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 {header}\nH 0 0 0\n')
    if pbc is not None:
        assert read(path)[0].pbc.tolist() == pbc
        return
    with pytest.raises(InputError, match=r"structure 0 (has the pbc .* neither T nor F|cannot be read)"):
        read(path)


def test_slabs_and_wires_need_no_full_cell() -> None:
    slab = Atoms("H", cell=[2, 2, 0], pbc=[True, True, False])
    wire = Atoms("H", cell=[0, 0, 3], pbc=[False, False, True])
    assert len(read([slab, wire])) == 2


def test_other_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="structure 1 has no atoms"):
        read([bulk("Cu"), Atoms()])
    with pytest.raises(InputError, match="nothing to read"):
        read()
    with pytest.raises(InputError, match="cannot read from int"):
        read(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no structure files"):
        read(tmp_path)
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="no pymatgen structures"):
        read(tmp_path / "a.json")
    (tmp_path / "a.db").write_text("this is no database, whatever its name may say")
    with pytest.raises(InputError, match=r"a\.db"):
        read(tmp_path / "a.db")
    with pytest.raises(InputError, match="belongs to a folder"):
        read(bulk("Cu"), csv=tmp_path / "a.csv")


def test_public_data(public_data: Path) -> None:
    structures = read(public_data / "water_pbe0ts", public_data / "matbench_jdft2d" / "all.extxyz.xz")
    assert len(structures) == 320 + 80 + 636
    assert structures[0].get_forces().shape == (192, 3)
    assert structures[-1].info["mbid"].startswith("mb-jdft2d")
