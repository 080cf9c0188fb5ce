"""Files of RuNNer and n2p2: in eV and Å whatever they are in, one by one, and errors that name the line."""

import bz2
import gzip
import logging
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from transfermium.data import pack, read, resolve, stream
from transfermium.data.runner import is_runner, stream_runner
from transfermium.errors import InputError

HARTREE, BOHR = 27.211386, 0.52917721  # eV, Å; written by hand
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

WATER = """begin
comment one molecule in a box
lattice 20.0 0.0 0.0
lattice 1.0 20.0 0.0
lattice 0.0 0.0 30.0
atom  1.00 2.00 3.00 O -0.80 0.0  0.010 -0.020  0.030
atom  2.81 2.00 3.00 H  0.40 0.0 -0.010  0.020  0.000
atom  0.55 3.75 3.00 H  0.40 0.0  0.000  0.000 -0.030
energy -76.4
charge 0.0
end
"""
ION = """begin
atom 0.0 0.0 0.0 O 0.0 0.0 0.0 0.0 0.0
atom 0.0 0.0 1.8 H 0.0 0.0 0.0 0.0 0.0
charge -1.0
end
"""


def write(folder: Path, text: str, name: str = "input.data") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_hartree_and_bohr_become_our_units(tmp_path: Path) -> None:
    water, ion = read(write(tmp_path, WATER + ION))
    assert water.get_chemical_symbols() == ["O", "H", "H"] and water.pbc.all() and not ion.pbc.any()
    np.testing.assert_allclose(water.positions[1], [2.81 * BOHR, 2 * BOHR, 3 * BOHR], rtol=1e-7)
    np.testing.assert_allclose(water.cell[1], [BOHR, 20 * BOHR, 0], rtol=1e-7)  # rows are vectors
    assert water.get_potential_energy() == pytest.approx(-76.4 * HARTREE, rel=1e-7)
    np.testing.assert_allclose(water.get_forces()[0], np.array([0.01, -0.02, 0.03]) * HARTREE / BOHR, rtol=1e-6)
    assert water.info == {"comment": "one molecule in a box"}
    assert water.arrays["charges"].tolist() == [-0.8, 0.4, 0.4]


def test_forces_are_minus_the_derivative_of_the_energy_after_the_conversion(tmp_path: Path) -> None:
    """A spring between two atoms, written in Hartree and Bohr."""
    k, r0 = 0.37, 1.4
    frame = "begin\natom 0 0 0 H 0 0 0 0 {f}\natom 0 0 {r} H 0 0 0 0 -{f}\nenergy {e}\nend\n"
    text = "".join(frame.format(r=r, e=k / 2 * (r - r0) ** 2, f=k * (r - r0)) for r in (1.5995, 1.6, 1.6005))
    before, here, after = read(write(tmp_path, text))
    slope = (after.get_potential_energy() - before.get_potential_energy()) / (after.positions - before.positions)[1, 2]
    assert here.get_forces()[1, 2] == pytest.approx(-slope, rel=1e-6)


def test_exponents_of_fortran_are_read(tmp_path: Path) -> None:
    (water,) = read(write(tmp_path, WATER.replace("-76.4", "-7.64D+01").replace("0.010", "1.0d-2")))
    assert water.get_potential_energy() == pytest.approx(-76.4 * HARTREE, rel=1e-7)
    assert water.get_forces()[0, 0] == pytest.approx(0.01 * HARTREE / BOHR, rel=1e-6)


def test_a_structure_without_energy_and_forces_has_no_labels(tmp_path: Path) -> None:
    structures = read(write(tmp_path, WATER + ION))
    assert structures[1].calc is None and structures[1].info == {"charge": -1.0}
    assert resolve(structures, ["energy", "forces"])["energy"].count == 1


def test_forces_that_are_zero_everywhere_are_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    still = ION.replace("charge -1.0", "energy -75.0")
    lone = "begin\natom 0.0 0.0 0.0 O 0.0 0.0 0.0 0.0 0.0\nenergy -74.0\nend\n"
    structures = read(write(tmp_path, still + lone + still))
    assert [atoms.get_potential_energy() for atoms in structures] == pytest.approx(
        [-75 * HARTREE, -74 * HARTREE, -75 * HARTREE], rel=1e-7
    )
    assert not any("forces" in atoms.calc.results for atoms in structures)
    assert "all forces are zero" in caplog.text
    caplog.clear()
    for text in (still + lone, still + WATER):  # one may be at rest, and the others show that forces are known
        assert all("forces" in atoms.calc.results for atoms in read(write(tmp_path, text)))
    assert "all forces are zero" not in caplog.text


def test_what_a_file_declares_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = WATER.replace("2.81", "1.96").replace("0.55 3.75", "0.76 2.93")
    for line in ("# units eV/Å", "! Units: eV/Ang", "#units=ev/a"):
        (water,) = read(write(tmp_path, f"# water\n{line}\n{plain}"))
        assert water.get_potential_energy() == -76.4
        np.testing.assert_allclose(water.positions[1], [1.96, 2, 3], rtol=1e-12)
        np.testing.assert_allclose(water.get_forces()[0], [0.01, -0.02, 0.03], rtol=1e-12)
    (mixed,) = read(write(tmp_path, f"# units kcal/mol/Å\n{plain}"))
    assert mixed.get_potential_energy() == pytest.approx(-76.4 * 0.0433641153, rel=1e-6)
    np.testing.assert_allclose(mixed.positions[1], [1.96, 2, 3], rtol=1e-12)
    (said,) = stream_runner(str(write(tmp_path, plain)), units="eV/Å")
    assert said.get_potential_energy() == -76.4
    assert not caplog.records


def test_an_assumed_unit_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(write(tmp_path, WATER))
    assert "taken in Hartree and Bohr" in caplog.text and "input.data" in caplog.text


@pytest.mark.parametrize("symbols", ["H2O", "NaCl", "Cu", "Al", "Li", "Si"])
def test_a_file_in_angstrom_is_not_taken_for_bohr(tmp_path: Path, symbols: str) -> None:
    atoms = {"H2O": lambda: molecule("H2O"), "NaCl": lambda: bulk("NaCl", "rocksalt", 5.64)}.get(
        symbols, lambda: bulk(symbols, cubic=True)
    )()
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=0.1 + np.zeros((len(atoms), 3)))
    path = write(tmp_path, n2p2(atoms))
    with pytest.raises(InputError, match=r"input\.data.* apart: .*'# units eV/Å'.*'# units Ha/bohr'"):
        read(path)
    (same,) = read(write(tmp_path, "# units eV/Å\n" + n2p2(atoms)))
    np.testing.assert_allclose(same.positions, atoms.positions, atol=1e-9)
    (forced,) = read(write(tmp_path, "# units Ha/bohr\n" + n2p2(atoms)))
    np.testing.assert_allclose(forced.positions, atoms.positions * BOHR, rtol=1e-6, atol=1e-9)
    (right,) = read(write(tmp_path, n2p2(atoms, HARTREE, BOHR)))
    np.testing.assert_allclose(right.positions, atoms.positions, rtol=1e-6, atol=1e-9)


def n2p2(atoms: Atoms, energy: float = 1.0, length: float = 1.0) -> str:
    """A structure in units that are so many eV and Å."""
    lines = ["begin", *(f"lattice {x} {y} {z}" for x, y, z in atoms.cell.array / length if atoms.pbc.any())]
    forces = atoms.get_forces() * length / energy
    for symbol, (x, y, z), (fx, fy, fz) in zip(atoms.symbols, atoms.positions / length, forces, strict=True):
        lines.append(f"atom {x} {y} {z} {symbol} 0.0 0.0 {fx} {fy} {fz}")
    return "\n".join([*lines, f"energy {atoms.get_potential_energy() / energy}", "end", ""])


def test_files_of_ase_come_back(tmp_path: Path) -> None:
    """Both as it writes them, with columns named after `begin`, and as it reads them."""
    pytest.importorskip("ase.io.runner")
    frames = []
    for seed in range(3):
        atoms = bulk("NaCl", "rocksalt", a=5.64) * (1, 1, 2) if seed else molecule("CH3OH")
        atoms.rattle(0.05, seed=seed)
        forces = np.random.default_rng(seed).normal(size=(len(atoms), 3))
        atoms.set_initial_charges(np.linspace(-1, 1, len(atoms)))
        atoms.calc = SinglePointCalculator(atoms, energy=-10.0 - seed, forces=forces)
        frames.append(atoms)
    ase.io.write(tmp_path / "ase.data", frames, format="runnerdata")
    write(tmp_path, WATER + WATER.replace("-76.4", "-75.0"))
    theirs = [frames, ase.io.read(tmp_path / "input.data", ":", format="runnerdata")]
    for expected, ours in zip(theirs, (read(tmp_path / "ase.data"), read(tmp_path / "input.data")), strict=True):
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected, strict=True):
            assert a.numbers.tolist() == b.numbers.tolist() and a.pbc.tolist() == b.pbc.tolist()
            np.testing.assert_allclose(a.positions, b.positions, atol=1e-9)
            np.testing.assert_allclose(a.cell.array, b.cell.array, atol=1e-9)
            np.testing.assert_allclose(a.get_forces(), b.get_forces(), atol=1e-8)
            assert a.get_potential_energy() == pytest.approx(b.get_potential_energy(), abs=1e-8)
            np.testing.assert_allclose(a.arrays["charges"], b.get_initial_charges(), atol=1e-9)


@pytest.mark.parametrize("ending", list(OPENERS))
def test_compressed_files_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"input.data{ending}"
    with OPENERS[ending](path, "wt") as file:
        file.write(WATER * 3)
    assert is_runner(path) and len(read(path)) == 3


def test_a_compressed_file_can_be_declared_without_unpacking_it(tmp_path: Path) -> None:
    plain = lzma.compress(WATER.encode())
    (tmp_path / "a.data.xz").write_bytes(lzma.compress("# units eV/Å\n".encode()) + plain)
    assert read(tmp_path / "a.data.xz")[0].get_potential_energy() == -76.4


def test_structures_are_read_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path, "# units Ha/bohr\n" + WATER * 40 + "begin\natom what\n")
    structures = stream(path)
    assert len([next(structures) for _ in range(40)]) == 40
    with pytest.raises(InputError, match="line 443: an atom has 9 values"):
        next(structures)


def test_other_files_that_look_alike_are_left_alone(tmp_path: Path) -> None:
    assert not is_runner(write(tmp_path, "LAMMPS data file\n\n3 atoms\n", "lammps.data"))
    assert not is_runner(write(tmp_path, "beginning\natom\n", "other.data"))
    assert is_runner(write(tmp_path, f"comment of all\n\n! and\n# more\n{WATER}", "no_ending"))
    assert is_runner(write(tmp_path, WATER.replace("\n", "\r\n"), "windows.data"))


def test_a_folder_of_them_is_read(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", WATER * 2, "gen0.data")
    write(tmp_path / "set", WATER, "gen1.data")
    write(tmp_path / "set", "LAMMPS data file\n", "system.data")
    structures = read(tmp_path / "set")
    assert [atoms.info["file"] for atoms in structures] == ["gen0.data", "gen0.data", "gen1.data"]
    packed = pack(read(tmp_path / "set"), tmp_path / "packed")
    assert packed[2].get_potential_energy() == pytest.approx(-76.4 * HARTREE, rel=1e-7)


def test_unknown_keywords_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (water,) = read(write(tmp_path, WATER.replace("charge 0.0", "spin 1\nspin 2")))
    assert water.get_potential_energy() < 0
    assert "2 lines 'spin'" in caplog.text and "line 10" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("charge 0.0\nend\n", "charge 0.0\n", r"begins in line 12 is cut short, its 'end' is missing"),
        ("lattice 0.0 0.0 30.0\n", "", r"line 21 .* 2 lattice vectors \(from line 12\).* molecule"),
        ("lattice 0.0 0.0 30.0", "lattice 0.0 0.0", r"line 16: .* three components, not 2"),
        (" O -0.80", " Ox -0.80", r"line 17: 'Ox' is no element"),
        (" O -0.80", " X -0.80", r"line 17: 'X' is no element"),
        ("2.81", "2.8l", r"line 18: '2.8l' is not a finite number"),
        ("0.030", "nan", r"line 17: 'nan' is not a finite number"),
        ("energy -76.4", "energy ***", r"line 20: '\*\*\*' is not"),
        ("energy -76.4", "energy -76.4\nenergy -76.5", r"line 21: a structure has one 'energy'"),
        ("  0.030\n", "\n", r"line 17: an atom has 9 values here .*, not 8"),
        ("atom", "# atom", r"line 22 ends a structure without atoms \(from line 12\)"),
        ("begin\n", "begin\nbegin\n", r"line 13 begins a structure, but that of line 12 has no 'end'"),
        ("begin\n", "", r"line 13: 'lattice' stands outside"),
        ("begin\n", "begin element position(3)\n", r"line 12: atoms begin with 'position\(3\) element'"),
        ("begin\n", "begin position(3) element force(x)\n", r"line 12: 'force\(x\)' is no column"),
        ("begin\n", "begin position(3) element numbers force(3)\n", r"line 12: a column 'numbers' would replace"),
        ("begin\n", "begin position(3) element charge charges\n", r"line 12: a column 'charges' would replace"),
        ("begin\n", "begin position(3) element element\n", r"line 12: a column 'element' would replace"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    broken = WATER.replace(old, new)
    assert broken != WATER
    with pytest.raises(InputError, match=r"input\.data: .*" + message) as caught:
        read(write(tmp_path, WATER + broken))
    assert "\n" not in str(caught.value)


def test_units_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input\.data: the units 'Hartree, Bohr' .* eV/Å or"):
        read(write(tmp_path, f"# units: Hartree, Bohr\n{WATER}"))


def test_a_file_cut_short_in_its_compression_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress((WATER * 500).encode())
    (tmp_path / "input.data.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"input\.data\.gz"):
        read(tmp_path / "input.data.gz")
