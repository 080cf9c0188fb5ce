"""Public sets: small files laid out as the real ones give our units, signs, ids and levels, one structure at a time."""

import bz2
import gzip
import importlib
import json
import tracemalloc
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from transfermium.data import pack, read, resolve, split, stream
from transfermium.data.public import JsonStream, pbe_or_pbe_u
from transfermium.errors import InputError

KBAR = 0.1 / 160.21766  # in eV/Å^3
FULL = [[10.0, 1.0, 2.0], [1.0, 20.0, 3.0], [2.0, 3.0, 30.0]]  # kbar, of VASP: compressed
VOIGT = -KBAR * np.array([10.0, 20.0, 30.0, 3.0, 2.0, 1.0])  # xx yy zz yz xz xy, of ASE
FORCES = [[0.1, 0.0, -0.2], [-0.1, 0.0, 0.2]]


def pymatgen(atoms: Atoms, **properties: list[Any]) -> dict[str, Any]:
    """A structure as pymatgen writes it, with properties of its sites."""
    sites = [
        {
            "species": [{"element": symbol, "occu": 1}],
            "abc": abc.tolist(),
            "xyz": xyz.tolist(),
            "label": symbol,
            "properties": {key: values[i] for key, values in properties.items()},
        }
        for i, (symbol, abc, xyz) in enumerate(
            zip(atoms.get_chemical_symbols(), atoms.get_scaled_positions(), atoms.positions, strict=True)
        )
    ]
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": 0,
        "lattice": {"matrix": atoms.cell.tolist(), "pbc": [True, True, True], "volume": atoms.get_volume()},
        "properties": {},
        "sites": sites,
    }


def oxide(metal: str = "Fe") -> Atoms:
    return bulk(f"{metal}O", "rocksalt", a=4.3)


def mptrj_frame(energy: float = -15.0, **others: Any) -> dict[str, Any]:
    return {
        "structure": pymatgen(oxide()),
        "uncorrected_total_energy": energy,
        "corrected_total_energy": energy - 2.5,
        "energy_per_atom": (energy - 2.5) / 2,
        "ef_per_atom": -1.2,
        "e_per_atom_relaxed": -8.8,
        "ef_per_atom_relaxed": -1.3,
        "force": FORCES,
        "stress": FULL,
        "magmom": [3.7, 0.1],
        "bandgap": 0.4,
        "mp_id": "mp-18905",
        **others,
    }


def mptrj(n_materials: int = 2) -> dict[str, Any]:
    return {
        f"mp-{i}": {f"mp-{i}-0-{step}": mptrj_frame(-15.0 - i - step) for step in range(2)} for i in range(n_materials)
    }


def matpes(name: str = "matpes-20240214_30496_38", **others: Any) -> dict[str, Any]:
    return {
        "builder_meta": {"emmet_version": "0.84", "license": None},
        "nsites": 2,
        "elements": ["Fe", "O"],
        "formula_pretty": "FeO",
        "volume": 19.9,
        "structure": pymatgen(oxide()),
        "energy": -34.9,
        "forces": FORCES,
        "stress": [10.0, 20.0, 30.0, 3.0, 2.0, 1.0],
        "matpes_id": name,
        "bandgap": 0.0,
        "functional": "r2SCAN",
        "formation_energy_per_atom": None,
        "cohesive_energy_per_atom": -1.29,
        "bader_charges": [8.9, 13.1],
        "bader_magmoms": None,
        "provenance": {"original_mp_id": "mp-30496", "md_temperature": 300.0, "md_step": 726},
        **others,
    }


def alexandria_entry(mat_id: str = "agm002229171") -> dict[str, Any]:
    return {
        "@module": "pymatgen.entries.computed_entries",
        "@class": "ComputedStructureEntry",
        "energy": -15.0,
        "composition": {"Fe": 1.0, "O": 1.0},
        "entry_id": None,
        "correction": -0.7,
        "energy_adjustments": [],
        "parameters": {},
        "data": {
            "mat_id": mat_id,
            "prototype_id": "other",
            "formula": "FeO",
            "nsites": 2,
            "spg": 225,
            "stress": FULL,
            "energy_total": -15.0,
            "energy_corrected": -15.7,
            "total_mag": 4.0,
            "band_gap_ind": 0.3,
            "e_form": -1.1,
            "decomposition": "FeO",
        },
        "structure": pymatgen(oxide(), magmom=[3.7, 0.1], charge=[6.9, 7.1], forces=FORCES),
    }


def alexandria_runs(**stated: Any) -> list[dict[str, Any]]:
    step = {"structure": pymatgen(oxide()), "energy": -15.0, "forces": FORCES, "stress": FULL}
    return [{"kpoints": [4, 4, 4], "ENMAX": 520.0, **stated, "steps": [step] * n} for n in (2, 1)]


def optimade(material: str = "agm002229171", **others: Any) -> dict[str, Any]:
    atoms = oxide()
    return {
        "elements": ["Fe", "O"],
        "nsites": 2,
        "chemical_formula_reduced": "FeO",
        "nelements": 2,
        "dimension_types": [1, 1, 1],
        "nperiodic_dimensions": 3,
        "lattice_vectors": atoms.cell.tolist(),
        "immutable_id": material,
        "cartesian_site_positions": atoms.positions.tolist(),
        "species": "[]",
        "species_at_sites": ["Fe", "O"],
        "last_modified": "2023-11-16",
        "elements_ratios": [0.5, 0.5],
        "stress_tensor": FULL,
        "energy": -15.0,
        "magnetic_moments": [3.7, 0.1],
        "forces": FORCES,
        "total_magnetization": 4.0,
        "dos_ef": 0.2,
        "functional": "pbe",
        "cross_compatibility": True,
        "entalpic_fingerprint": "abc",
        **others,
    }


def write_json(path: Path, content: Any) -> Path:
    opener: dict[str, Any] = {".bz2": bz2.open, ".gz": gzip.open}
    with opener.get(path.suffix, open)(path, "wt") as file:
        json.dump(content, file)
    return path


def assert_labelled(atoms: Atoms, energy: float = -15.0) -> None:
    """Energy, forces and stress of the examples, in our units and signs."""
    results = atoms.calc.results
    assert results["energy"] == energy
    np.testing.assert_allclose(results["forces"], FORCES)
    np.testing.assert_allclose(results["stress"], VOIGT, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- JSON


def test_mptrj_has_uncorrected_energies_and_knows_its_trajectories(tmp_path: Path) -> None:
    structures = read(write_json(tmp_path / "MPtrj_2022.9_full.json", mptrj()))

    assert len(structures) == 4
    assert_labelled(structures[0])
    np.testing.assert_allclose(structures[0].calc.results["magmoms"], [3.7, 0.1])
    info = structures[3].info
    assert (info["material_id"], info["traj_id"], info["frame_id"], info["ionic_step"]) == (
        "mp-1",
        "mp-1-0",
        "mp-1-0-1",
        1,
    )
    assert info["level"] == "PBE+U"
    assert (info["corrected_total_energy"], info["bandgap"]) == (-19.5, 0.4)
    assert split(structures, 0.5).by == "material_id+traj_id"


def test_mpf_has_lists_per_material(tmp_path: Path) -> None:
    material = {
        "structure": [pymatgen(bulk("Si")), pymatgen(bulk("Si"))],
        "energy": [-10.8, -10.9],
        "force": [FORCES, FORCES],
        "stress": [FULL, FULL],
        "id": ["mp-149-1-0", "mp-149-0-3"],
    }
    first, second = read(write_json(tmp_path / "MPF.2021.2.8.json", {"mp-149": material}))

    assert_labelled(first, -10.8)
    assert_labelled(second, -10.9)
    assert first.info["level"] == "PBE"
    assert [a.info["traj_id"] for a in (first, second)] == ["mp-149-1", "mp-149-0"]
    assert second.info["ionic_step"] == 3


def test_mpf_as_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "block_0.p").write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(InputError, match=r"block_0\.p: pickles run any code and are never loaded; save .* as JSON"):
        read(tmp_path / "block_0.p")


@pytest.mark.parametrize(
    ("file", "level"),
    [
        ("pbe/alexandria_000.json.bz2", "PBE+U"),
        ("alexandria_000.json", "PBE+U"),
        ("alexandria_ps_000.json.bz2", "PBEsol"),
        ("alexandria_scan_000.json", "SCAN"),
        ("crystals.json", None),
    ],
)
def test_alexandria_has_forces_on_its_sites_and_the_functional_in_its_name(
    tmp_path: Path, file: str, level: str | None
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    first, second = read(write_json(tmp_path / file, {"entries": [alexandria_entry(), alexandria_entry("agm1")]}))

    assert_labelled(first)
    np.testing.assert_allclose(first.calc.results["magmoms"], [3.7, 0.1])
    assert "forces" not in first.arrays
    assert (first.info["material_id"], second.info["material_id"]) == ("agm002229171", "agm1")
    assert first.info.get("level") == level
    assert (first.info["energy_corrected"], first.info["spg"], first.info["band_gap_ind"]) == (-15.7, 225, 0.3)


def test_alexandria_paths_are_one_trajectory_per_run(tmp_path: Path) -> None:
    structures = read(write_json(tmp_path / "pbe_0000.json.bz2", {"agm1": alexandria_runs(), "agm2": []}))

    assert [a.info["traj_id"] for a in structures] == ["agm1-0", "agm1-0", "agm1-1"]
    assert [a.info["ionic_step"] for a in structures] == [0, 1, 0]
    assert {a.info["level"] for a in structures} == {"PBE+U"}
    for atoms in structures:
        assert_labelled(atoms)
    stated = read(write_json(tmp_path / "pbe_0001.json.bz2", {"agm1": alexandria_runs(functional="PBESOL")}))
    assert stated[0].info["level"] == "PBEsol"


@pytest.mark.parametrize("layout", ["list", "lines"])
def test_matpes_states_its_functional(tmp_path: Path, layout: str) -> None:
    records = [matpes(), matpes("matpes-20240214_1_2", functional="PBE", stress=None)]
    path = tmp_path / "MatPES-R2SCAN-2025.2.json"
    path.write_text("\n".join(map(json.dumps, records)) if layout == "lines" else json.dumps(records))
    first, second = read(path)

    assert_labelled(first, -34.9)
    assert (first.info["level"], second.info["level"]) == ("r2SCAN", "PBE")  # it is never with U
    assert (first.info["material_id"], first.info["matpes_id"]) == ("mp-30496", "matpes-20240214_30496_38")
    assert (first.info["bandgap"], first.info["cohesive_energy_per_atom"]) == (0.0, -1.29)
    assert "formation_energy_per_atom" not in first.info
    np.testing.assert_allclose(first.arrays["bader_charges"], [8.9, 13.1])
    assert "stress" not in second.calc.results


def test_labels_with_holes_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holes = mptrj_frame(force=[[None, None, None], [0.0, 0.0, 0.0]], magmom=None, stress=[])
    whole, broken = read(write_json(tmp_path / "mptrj.json", {"mp-1": {"mp-1-0-0": mptrj_frame(), "mp-1-0-1": holes}}))

    assert whole.calc.results.keys() == {"energy", "forces", "stress", "magmoms"}
    assert broken.calc.results.keys() == {"energy"}
    assert "left out 1 labels 'forces' that are incomplete or of a wrong shape (first: mp-1-0-1)" in caplog.text
    assert "stress" not in caplog.text  # there was none


def test_labels_are_found_without_being_named(tmp_path: Path) -> None:
    labels = resolve(read(write_json(tmp_path / "x.json", mptrj())), ["energy", "forces", "stress"])
    assert [(entry.count, entry.factor) for entry in labels.entries] == [(4, 1.0)] * 3


def test_a_set_streams_into_a_packed_one(tmp_path: Path) -> None:
    packed = pack(write_json(tmp_path / "x.json", mptrj(3)), tmp_path / "packed", progress=False)
    assert (len(packed), packed.levels) == (6, {"PBE+U": 6})
    assert_labelled(packed[0])


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95, 0.999])
def test_a_file_that_is_cut_short_says_so(tmp_path: Path, cut: float) -> None:
    path = write_json(tmp_path / "x.json", mptrj(5))
    text = path.read_text()
    path.write_text(text[: int(cut * len(text))])

    structures = stream(path)
    with pytest.raises(InputError, match=r"x\.json: the file is cut short \(.* record [0-5]\); copy it again$"):
        list(structures)


def test_a_compressed_file_that_is_cut_short_says_so(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json.bz2", mptrj(5))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"x\.json\.bz2: the compressed file is damaged or cut short"):
        list(stream(path))


def test_a_record_without_a_structure_is_named(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", {**mptrj(1), "mp-7": {"mp-7-0-0": {"force": FORCES}}})
    with pytest.raises(InputError, match=r"x\.json: record 1 \(mp-7\) is not like the others .*KeyError: 'structure'"):
        list(stream(path))


def test_json_of_other_kinds_is_read_as_before(tmp_path: Path) -> None:
    silicon = pymatgen(bulk("Si"))
    for content in (silicon, [silicon], {"structures": [silicon]}, [{"structure": silicon, "band_gap": 0.6}]):
        assert len(read(write_json(tmp_path / "x.json", content))) == 1
    with pytest.raises(InputError, match="no pymatgen structures, MatBench table or ASE database"):
        read(write_json(tmp_path / "x.json", {"entries": [{"name": "x"}]}))


# ------------------------------------------------------------------------------------------------------- streaming


class Endless:
    """The text of an MPtrj file that never ends; counts what has been read of it."""

    def __init__(self) -> None:
        self.given = 0
        self.parts = self._parts()

    def _parts(self) -> Iterator[str]:
        yield "{"
        for i in range(10**9):
            yield f'"mp-{i}": {json.dumps({f"mp-{i}-0-0": mptrj_frame()})}, '

    def read(self, size: int) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < size:
            parts.append(next(self.parts))
        self.given += sum(map(len, parts))
        return "".join(parts)


def test_a_file_of_any_length_needs_the_memory_of_a_record() -> None:
    file: Any = Endless()
    json_stream = JsonStream(file, Path("endless.json"))
    json_stream.CHUNK = 1 << 16
    members = json_stream.members()
    next(members)
    assert file.given < 2**18  # long before the end

    tracemalloc.start()
    try:
        keys = [key for key, _ in islice(members, 5000)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert keys[-1] == "mp-5000"
    assert peak < file.given / 5


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_values_do_not_depend_on_how_the_text_is_divided(tmp_path: Path, chunk: int) -> None:
    content = {"a": [1, 2.5e-3, '}\\"{'], "b": {"c": None, "d": [[], {}]}, "e": -12, "f": "å\u2028"}
    for text in (json.dumps(content), json.dumps(content, indent=2, ensure_ascii=False)):
        (tmp_path / "x.json").write_text(text)
        with (tmp_path / "x.json").open() as file:
            stream = JsonStream(file, tmp_path / "x.json")
            stream.CHUNK = chunk
            assert dict(stream.members()) == content


def test_text_that_is_not_json_is_not_read_to_its_end() -> None:
    file: Any = Endless()
    file.parts = iter(['{"a": {x', *[" " * 10**6] * 100])
    with pytest.raises(InputError, match=r"is not sound JSON \(Expecting property name"):
        list(JsonStream(file, Path("x.json")).members())
    assert file.given < 10**8


def test_the_first_structure_comes_before_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "x.json", mptrj(200))
    monkeypatch.setattr(JsonStream, "CHUNK", 1 << 12)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])

    structures = stream(path)
    assert next(structures).info["material_id"] == "mp-0"
    with pytest.raises(InputError, match="cut short"):
        list(structures)


# ---------------------------------------------------------------------------------------------------------- Parquet


def test_lemat_bulk_is_read_from_parquet(tmp_path: Path) -> None:
    rows = [
        optimade(),
        optimade("mp-1", functional="pbesol", forces=[], stress_tensor=None),
        optimade("oqmd-1", functional="scan"),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    first, second, third = read(tmp_path / "train-00000-of-00001.parquet")

    assert_labelled(first)
    np.testing.assert_allclose(first.calc.results["magmoms"], [3.7, 0.1])
    assert [a.info["level"] for a in (first, second, third)] == ["PBE+U", "PBEsol", "SCAN"]
    assert first.info["material_id"] == "agm002229171"
    assert first.info["cross_compatibility"] is True and first.info["dos_ef"] == 0.2
    assert second.calc.results.keys() == {"energy", "magmoms"}
    assert first.pbc.all()


def test_steps_of_lemat_traj_share_a_trajectory(tmp_path: Path) -> None:
    rows = [optimade(relaxation_number=0, relaxation_step=step, energy_corrected=-15.7) for step in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    structures = read(tmp_path)  # a folder of tables
    assert {a.info["traj_id"] for a in structures} == {"agm002229171-pbe-0"}
    assert [a.info["relaxation_step"] for a in structures] == [0, 1, 2]


def test_rows_of_a_table_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.Table.from_pylist([optimade(f"agm{i}") for i in range(600)]), tmp_path / "x.parquet")
    batches: list[int] = []
    wrapped = pq.ParquetFile.iter_batches

    def counted(self: Any, size: int) -> Iterator[Any]:
        for batch in wrapped(self, size):
            batches.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    structures = stream(tmp_path / "x.parquet")
    next(structures)
    assert len(batches) == 1 and batches[0] <= 256
    assert len(list(structures)) == 599


def test_other_tables_are_refused_by_their_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"smiles": ["CCO"], "gap": [1.0]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"no structures in this table; .*species_at_sites.* and it has smiles, gap"):
        read(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"x\.parquet: the table is damaged or cut short"):
        read(tmp_path / "x.parquet")


# ---------------------------------------------------------------------------------------------------------- aselmdb


def write_aselmdb(path: Path, rows: dict[int, dict[str, Any]], **entries: Any) -> Path:
    """A database as fairchem writes it: compressed JSON under the numbers of the rows."""
    lmdb = pytest.importorskip("lmdb")
    content = {"nextid": max(rows) + 1, "metadata": {}} | entries | {str(number): row for number, row in rows.items()}
    with lmdb.open(str(path), subdir=False, map_size=2**24) as database, database.begin(write=True) as writer:
        for key, value in content.items():
            writer.put(key.encode(), zlib.compress(json.dumps(value).encode()))
    path.with_name(f"{path.name}-lock").unlink(missing_ok=True)
    return path


def row(atoms: Atoms, data: dict[str, Any], **results: Any) -> dict[str, Any]:
    return {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.tolist(),
        "pbc": atoms.pbc.tolist(),
        "unique_id": "0123456789abcdef",
        "ctime": 24.8,
        "mtime": 24.8,
        "user": "someone",
        "calculator": "unknown",
        "calculator_parameters": {},
        "data": data,
        **results,
    }


def omat(sid: str, **results: Any) -> dict[str, Any]:
    return row(oxide(), {"sid": sid}, energy=-15.0, forces=FORCES, stress=VOIGT.tolist(), **results)


@pytest.mark.parametrize("folder", ["automation", "diplomat-thesis", "homcage"])
def test_a_name_that_only_holds_that_of_a_set_says_nothing(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (atoms,) = read(write_aselmdb(tmp_path / folder / "data.aselmdb", {1: omat("x1")}))
    assert "level" not in atoms.info


def test_omat24_is_in_our_units_already(tmp_path: Path) -> None:
    rows = {number: omat(f"agm{number:09d}_rattled") for number in range(1, 13)}
    path = write_aselmdb(tmp_path / "data.0000.aselmdb", {k: v for k, v in rows.items() if k != 5}, deleted_ids=[5])
    structures = read(path)

    assert len(structures) == 11
    assert_labelled(structures[0])
    assert [a.info["sid"][:12] for a in structures][:5] == [f"agm{n:09d}" for n in (1, 2, 3, 4, 6)]  # in order
    assert structures[0].info["material_id"] == "agm000000001"
    assert structures[0].info["level"] == "PBE+U"


def test_omol25_knows_charge_and_spin(tmp_path: Path) -> None:
    water = molecule("H2O")
    data = {
        "source": "electrolytes/job_1", "data_id": "elytes", "charge": -1, "spin": 2, "num_atoms": 3,
        "homo_lumo_gap": [7.1, 7.2], "mulliken_charges": [-0.8, 0.1, -0.3], "composition": "H2O",
    }  # fmt: skip
    forces = [[0.0, 0.0, 0.1], [0.0, 0.0, -0.05], [0.0, 0.0, -0.05]]
    path = write_aselmdb(tmp_path / "data0000.aselmdb", {1: row(water, data, energy=-2079.0, forces=forces)})
    (atoms,) = read(path)

    assert atoms.info["level"] == "wB97M-V/def2-TZVPD"
    assert (atoms.info["charge"], atoms.info["spin"]) == (-1, 2)
    assert atoms.calc.results["energy"] == -2079.0
    np.testing.assert_allclose(atoms.calc.results["forces"], forces)
    assert "stress" not in atoms.calc.results
    np.testing.assert_allclose(atoms.info["mulliken_charges"], [-0.8, 0.1, -0.3])


def test_a_folder_of_aselmdb_files_is_one_set(tmp_path: Path) -> None:
    folder = tmp_path / "omat" / "rattled-300"
    folder.mkdir(parents=True)
    for i in range(2):
        write_aselmdb(folder / f"data.{i:04d}.aselmdb", {1: omat(f"x{i}")})
    np.savez(folder / "metadata.npz", natoms=[2, 2])
    structures = read(folder)
    assert [a.info["sid"] for a in structures] == ["x0", "x1"]
    assert {a.info["level"] for a in structures} == {"PBE+U"}  # as the folder says


def test_a_row_without_hints_has_no_level(tmp_path: Path) -> None:
    (atoms,) = read(write_aselmdb(tmp_path / "mine.aselmdb", {1: omat("x1")}))
    assert "level" not in atoms.info and "material_id" not in atoms.info


def test_a_database_that_is_cut_short_or_lacks_a_row_says_so(tmp_path: Path) -> None:
    path = write_aselmdb(tmp_path / "x.aselmdb", {n: omat(f"agm{n}") for n in (1, 3)})
    with pytest.raises(InputError, match=r"x\.aselmdb: row 2 is missing"):
        read(path)
    path = write_aselmdb(tmp_path / "y.aselmdb", {n: omat(f"agm{n}") for n in range(1, 200)})
    path.write_bytes(path.read_bytes()[: 2 * 4096])
    with pytest.raises(InputError, match=r"y\.aselmdb: the file has 8192 of its \d+ bytes; copy it again"):
        read(path)


def test_without_lmdb_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_aselmdb(tmp_path / "x.aselmdb", {1: omat("agm1")})

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"needs lmdb: pip install 'transfermium\[lmdb\]'"):
        read(path)


# ----------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize(
    ("formula", "level"),
    [
        ("FeO", "PBE+U"),
        ("CoF2", "PBE+U"),
        ("FeS2", "PBE"),
        ("MgO", "PBE"),
        ("Fe2", "PBE"),
        ("TiO2", "PBE"),
        ("WO3", "PBE+U"),
    ],
)
def test_only_some_oxides_and_fluorides_have_a_u(formula: str, level: str) -> None:
    assert pbe_or_pbe_u(Atoms(formula)) == level
