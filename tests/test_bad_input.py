"""Malformed input of every kind: one clear sentence, exit status 2, no traceback, and nothing half-written.

A row says what is written, what is typed, and what the sentence must contain. Commands run in a folder with
`a.extxyz` (6 alloys), `many.extxyz` (60 of them) and `potential.safetensors`.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import math
import os
import pickle
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
import torch

import transfermium as tm
from tests.alloys import alloys, potential
from transfermium import cli

Writer = Callable[[], Any]


class Row(NamedTuple):
    name: str
    write: Writer
    command: str
    words: str  # a regular expression for the sentence
    kept: str = ""  # a folder of whole results that may stay


# ------------------------------------------------------------------------------------------------ what is written


def nothing() -> None:
    pass


def file(name: str, content: str | bytes) -> Writer:
    def write() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def frame(
    *rows: str,
    cell: str = "4 0 0 0 4 0 0 0 4",
    info: str = "energy=-1.0",
    columns: str = "species:S:1:pos:R:3",
    pbc: str = "T T T",
) -> str:
    """Extended XYZ of one structure, by default two atoms in a cube."""
    rows = rows or ("Cu 0 0 0", "Au 2 2 0")
    lattice = f'Lattice="{cell}" ' if cell else ""
    return "\n".join([str(len(rows)), f'{lattice}Properties={columns} {info} pbc="{pbc}"', *rows, ""])


@functools.cache
def good(n: int = 6) -> str:
    text = io.StringIO()
    ase.io.write(text, alloys(n), format="extxyz")
    return text.getvalue()


@functools.cache
def model_bytes() -> bytes:
    model = potential()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    card = {"format": 1, **model.architecture(), **model.card}
    return safetensors.torch.save(tensors, {"transfermium": json.dumps(card)})


def model(card: Callable[[dict[str, Any]], Any] = lambda card: None, tensors: Any = lambda tensors: None) -> Writer:
    """m.safetensors: the potential with another card, or other tensors."""

    def write() -> None:
        content = model_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        told = json.loads(header["__metadata__"]["transfermium"])
        changed = card(told)
        text = changed if isinstance(changed, str) else json.dumps(told)
        kept = safetensors.torch.load(content)
        safetensors.torch.save_file(tensors(kept) or kept, "m.safetensors", {"transfermium": text})

    return write


def entry(value: Any, *path: str) -> Writer:
    """A model whose card has this value here; the value `LEFT_OUT` takes it away."""

    def change(card: dict[str, Any]) -> None:
        for name in path[:-1]:
            card = card[name]
        card[path[-1]] = value
        if value is LEFT_OUT:
            del card[path[-1]]

    return model(change)


LEFT_OUT = object()


def table(text: str | bytes, *files: str) -> Writer:
    """The folder t with a table and structures."""

    def write() -> None:
        Path("t").mkdir()
        file("t/id.csv", text)()
        for name in files:
            file(f"t/{name}", frame())()

    return write


def packed(change: Writer = nothing, header: Callable[[dict[str, Any]], Any] = lambda header: None) -> Writer:
    """The folder set with two shards, changed afterwards."""

    def write() -> None:
        tm.data.pack(alloys(6), "set", shard_size=3, progress=False)
        path = Path("set/transfermium.json")
        content = json.loads(path.read_text())
        header(content)
        path.write_text(json.dumps(content))
        change()

    return write


SHARD = "set/shard-00001.arrow"


def zeroed() -> None:
    content = Path(SHARD).read_bytes()
    Path(SHARD).write_bytes(content[:8] + bytes(len(content) - 8))


def other_shard() -> None:
    """A sound Arrow file with other columns, and the header that says so."""
    batch = pa.record_batch({"x": [1, 2, 3]})
    with pa.OSFile(SHARD, "wb") as target, pa.ipc.new_file(target, batch.schema) as writer:
        writer.write_batch(batch)
    content = json.loads(Path("set/transfermium.json").read_text())
    content["shards"][1]["bytes"] = Path(SHARD).stat().st_size
    file("set/transfermium.json", json.dumps(content))()


def linked() -> None:
    shutil.move(SHARD, "outside.arrow")
    Path(SHARD).symlink_to(Path("outside.arrow").absolute())


def lies_at(path: str) -> Writer:
    """A set one of whose shards is said to lie elsewhere, where it does lie."""

    def change(header: dict[str, Any]) -> None:
        shutil.copy(SHARD, "outside.arrow")
        header["shards"][1]["file"] = path or str(Path("outside.arrow").absolute())

    return packed(header=change)


def optimade(cut: int = 0, **changes: Any) -> Writer:
    def write() -> None:
        cube = [[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]]
        row = {"species_at_sites": ["Cu"], "lattice_vectors": cube, "cartesian_site_positions": [[0.0, 0.0, 0.0]]}
        columns = {name: [value] for name, value in {**row, **changes}.items() if value is not LEFT_OUT}
        pyarrow.parquet.write_table(pa.table(columns), "bad.parquet")
        content = Path("bad.parquet").read_bytes()
        file("bad.parquet", content[: len(content) - cut])()

    return write


def database() -> None:
    with sqlite3.connect("bad.db") as tables:
        tables.execute("create table recipes (cake text)")
    tables.close()


def cut_trajectory() -> None:
    ase.io.write("bad.traj", alloys(6))
    file("bad.traj", Path("bad.traj").read_bytes()[:-200])()


# --------------------------------------------------------------------------------------------------------- the rows


def rows() -> Iterator[Row]:
    for part in (files, structures, labels, tables, json_files, formats, sets, models, configs, splits, options):
        for row in part():
            yield row._replace(name=f"{part.__name__}: {row.name}")


def pack_row(name: str, content: str | bytes, words: str, ending: str = "extxyz") -> Row:
    return Row(name, file(f"bad.{ending}", content), f"pack bad.{ending} --out OUT", rf"bad\.{ending}.*({words})")


def files() -> Iterator[Row]:
    yield pack_row("empty", "", "is empty")
    yield pack_row("blank lines", "\n\n\n", "no structures")
    yield pack_row("zeros", bytes(300), "number of atoms")
    yield pack_row("bytes", bytes(range(256)), "not text")
    yield pack_row("picture", b"\x89PNG\r\n\x1a\n" + bytes(100), "not text")
    yield pack_row("zip", b"PK\x03\x04" + bytes(100), "number of atoms")
    yield pack_row("prose", "once upon a time", "number of atoms, not with 'once upon a time'")
    yield pack_row("pickle", pickle.dumps([1]), "not text")
    yield pack_row("UTF-16", good().encode("utf-16"), "not text")
    yield pack_row("Latin-1", frame(info='note="café"').encode("latin-1"), "not text")
    for ending, library in (("xz", lzma), ("gz", gzip), ("bz2", bz2)):
        whole = library.compress(3 * good().encode())  # type: ignore[attr-defined]
        yield pack_row(f"truncated {ending}", whole[:-40], "cut short", f"extxyz.{ending}")
        yield pack_row(f"text named {ending}", good(), "damaged|is its ending right", f"extxyz.{ending}")
    damaged = bytearray(lzma.compress(good().encode()))
    damaged[200] ^= 255
    yield pack_row("damaged xz", bytes(damaged), "damaged", "extxyz.xz")
    yield pack_row("gz named xz", gzip.compress(good().encode()), "damaged", "extxyz.xz")
    yield Row("missing", nothing, "pack nothing.extxyz --out OUT", "no such file or folder")
    yield Row("long name", nothing, f"pack {'x' * 300} --out OUT", "File name too long|no such file")
    yield Row("empty folder", lambda: Path("bad").mkdir(), "pack bad --out OUT", "bad: no structure files")
    yield Row("folder of others", file("bad/thesis.tex", "x"), "pack bad --out OUT", "bad: no structure files")
    yield Row("nothing to judge", file("bad.xyz", ""), "evaluate potential.safetensors bad.xyz", "bad.xyz: .* empty")


def structures() -> Iterator[Row]:
    def judged(name: str, words: str, *atoms: str, **header: str) -> Row:
        text = frame(*atoms, **header)
        return Row(name, file("bad.extxyz", text), "evaluate potential.safetensors bad.extxyz", words)

    integers = "Z:I:1:pos:R:3"
    yield pack_row("count with a fraction", "2.5\n" + good(), "number of atoms, not with '2.5'")
    yield pack_row("count below zero", "-2\n" + good(), "number of atoms")
    yield pack_row("count of a billion atoms", "1000000000000\n\nCu 0 0 0\n", "cut short")
    yield pack_row("count of 5000 digits", "9" * 5000 + "\n\nCu 0 0 0\n", "number of atoms")
    yield pack_row("cut in an atom", good()[:-60], "structure 5 cannot be read")
    yield pack_row("cut between atoms", good().rsplit("\n", 2)[0] + "\n", "structure 5 is cut short")
    yield pack_row("no atoms", "0\n\n", "structure 0 has no atoms")
    yield pack_row("position NaN", frame("Cu nan 0 0"), "structure 0: the position of atom 0 is not finite")
    yield pack_row("position infinite", frame("Cu 0 0 0", "Cu 0 inf 0"), "position of atom 1 is not finite")
    yield pack_row("position a word", frame("Cu x 0 0"), "structure 0 cannot be read")
    yield pack_row("too few columns", frame("Cu 0 0"), "structure 0 cannot be read")
    yield pack_row("columns not there", frame(columns="species:S:1:pos:R:4"), "structure 0 cannot be read")
    yield pack_row("columns of no type", frame(columns="species:S:1:pos:Q:3"), "structure 0 cannot be read")
    yield pack_row("columns cut", frame(columns="species:S"), "structure 0 has no atoms")
    yield pack_row("unknown element", frame("Xx 0 0 0"), "structure 0 cannot be read .*Xx")
    yield pack_row("dummy atom", frame("X 0 0 0"), "has no element")
    yield pack_row("element 119", frame("119 0 0 0", columns=integers), "atomic number 119, which is no element")
    yield pack_row("element -1", frame("-1 0 0 0", columns=integers), "no element")
    yield pack_row("singular cell", frame(cell="4 0 0 8 0 0 0 0 4"), "structure 0 is periodic but its cell has no vol")
    yield pack_row("cell of zeros", frame(cell="0 0 0 0 0 0 0 0 0"), "no volume")
    yield pack_row("cell NaN", frame(cell="nan 0 0 0 4 0 0 0 4"), "structure 0.* cell")
    yield pack_row("cell of eight", frame(cell="4 0 0 0 4 0 0 0"), "structure 0 cannot be read")
    yield pack_row("two axes for pbc", frame(pbc="T T"), "structure 0 cannot be read")
    yield pack_row("pbc in words", frame(pbc="maybe not now"), "pbc 'maybe not now', which is neither T nor F")
    yield pack_row("slab without an axis", frame(cell="4 0 0 0 0 0 0 0 4", pbc="T T F"), "no volume")
    yield judged("a million Å apart", "larger than 10000 Å", "Cu 0 0 0", "Cu 1000000 0 0", cell="", pbc="F F F")
    yield judged("cell of a million Å", "cell longer than 10000 Å", cell="1e6 0 0 0 1e6 0 0 0 1e6")
    yield judged("cell beyond numbers", "longer|volume|finite", cell="1e300 0 0 0 1e300 0 0 0 1e300")
    yield judged("cell too small", "too small for its atoms: is it in Å", cell="0.01 0 0 0 0.01 0 0 0 0.01")
    yield judged("cell in other units", "too small for its atoms", cell="0.03 0 0 0 0.03 0 0 0 0.03")
    yield judged("slab too small", "1e-08 Å.2, too small", cell="1e-4 0 0 0 1e-4 0 0 0 9", pbc="T T F")
    yield judged("wire too short", "1e-06 Å, too small", cell="1e-6 0 0 0 9 0 0 0 9", pbc="T F F")
    yield judged("flat cell", "too small|volume", cell="4 0 0 0 4 0 4 4 1e-6")
    yield judged(
        "two atoms in one", r"bad\.extxyz: structure \d+: .*two atoms at the same place", "Cu 0 0 0", "Cu 0 0 0"
    )


def labels() -> Iterator[Row]:
    def judged(name: str, words: str, text: str, more: str = "") -> Row:
        return Row(name, file("bad.extxyz", text), f"evaluate potential.safetensors bad.extxyz {more}", words)

    forces = "species:S:1:pos:R:3:forces:R:3"
    yield judged("energy a word", "structure 0: 'energy' .*'unknown', which is no number", frame(info="energy=unknown"))
    yield judged("energy infinite", "structure 0.*not finite", frame(info="energy=inf"))
    yield judged("energy NaN", "structure 0.*not finite", frame(info="energy=nan"))
    yield judged("energy true", "structure 0.*True, which is no number", frame(info="energy=T"))
    yield judged("energy of three numbers", "shape .3,., but an energy is one", frame(info='energy="1 2 3"'))
    yield judged("energy missing", "no structure has any of the labels energy, forces, stress", frame(info=""))
    yield judged(
        "forces of two columns",
        "structure 0.*forces of 2 atoms are 2 × 3",
        frame("Cu 0 0 0 1 1", "Au 2 2 0 1 1", columns="species:S:1:pos:R:3:forces:R:2"),
    )
    yield judged(
        "forces in words",
        "structure 0 cannot be read",
        frame("Cu 0 0 0 a b c", "Au 2 2 0 a b c", columns="species:S:1:pos:R:3:forces:S:3"),
    )
    yield judged("forces NaN", "not finite", frame("Cu 0 0 0 nan 0 0", "Au 2 2 0 0 0 0", columns=forces))
    yield judged("forces of an atom", "cannot be read", frame("Cu 0 0 0 1 1 1", "Au 2 2 0", columns=forces))
    yield judged("forces of five numbers", "forces of 2 atoms are 2 × 3", frame(info='energy=1 forces="1 2 3 4 5"'))
    yield judged("stress of five numbers", "stress", frame(info='energy=1 dft_stress="1 2 3 4 5"'))
    yield judged("stress not symmetric", "not symmetric", frame(info='energy=1 dft_stress="1 2 3 4 5 6 7 8 9"'))
    yield judged(
        "virial without a cell", "needs the volume", frame(info='dft_virial="1 2 3 4 5 6"', cell="", pbc="F F F")
    )
    yield judged("key not there", "no structure has 'e_dft' for 'energy'", frame(), "--label energy=e_dft")
    yield judged("unit of no kind", "unknown unit 'furlong' of energy", frame(), "--unit energy=furlong")
    yield judged("unit of another kind", "unknown unit 'GPa' of forces", frame(), "--unit forces=GPa")
    yield judged("label of nothing", "label 'bandgap' is not wanted here", frame(), "--label bandgap=x")
    yield judged("test set of nothing", "no structure has 'fold'", frame(), "--split-key fold=1")
    property = "--objective Property --objective.name gap --steps 1 --out OUT"
    vectors = "".join(frame(info=f'gap="1 {k}"') for k in range(4))
    yield Row(
        "property of two numbers", file("bad.xyz", vectors), f"pretrain bad.xyz {property}", "'gap' is of shape .2,."
    )
    words = table("id,gap\na,1.5\nb,many\n", "a.xyz", "b.xyz")
    yield Row("property a word", words, f"pretrain t {property}", "'gap' is the text 'many' where a number is expected")


def tables() -> Iterator[Row]:
    def folder(name: str, words: str, text: str | bytes, *files: str) -> Row:
        return Row(name, table(text, *files), "pack t --out OUT", rf"id\.csv.*({words})")

    yield folder("no files", "none of its 1 rows names a structure file", "id,gap\na,1\n")
    yield folder("file missing", r"1 rows without a structure file \(b\)", "id,gap\na,1\nb,2\n", "a.xyz")
    yield folder("row missing", r"1 structure files without a row \(b.xyz\)", "id,gap\na,1\n", "a.xyz", "b.xyz")
    yield folder("id given twice", "rows 1 and 2 both name a.xyz", "id,gap\na,1\na,2\n", "a.xyz")
    yield folder("column given twice", "a name of its own", "id,gap,gap\na,1,2\n", "a.xyz")
    yield folder("row too long", "row 1 has 3 cells for 2 columns", "id,gap\na,1,7\n", "a.xyz")
    yield folder("empty", "is empty", "", "a.xyz")
    yield folder("header alone", "no rows", "id,gap\n", "a.xyz")
    yield folder("UTF-16", "not UTF-8", "id,gap\na,1\n".encode("utf-16"), "a.xyz")
    yield folder("Latin-1", "not UTF-8", "id,note\na,café\n".encode("latin-1"), "a.xyz")
    yield folder("quotation open", "quotation mark left open", 'id,note\na,"' + 200_000 * "x" + "\n", "a.xyz")
    yield Row(
        "table alone", file("bad.csv", "id,gap\na,1\n"), "pack bad.csv --out OUT", "bad.csv: a table has no structures"
    )
    two = table("id,gap\na,1\n", "a.xyz")
    yield Row("two tables", lambda: (two(), file("t/b.csv", "x")()), "pack t --out OUT", "there are 2 CSV files")
    twice = table("id,gap\na,1\n")
    yield Row("two structures", lambda: (twice(), file("t/a.xyz", 2 * frame())()), "pack t --out OUT", "2 structures")


def json_files() -> Iterator[Row]:
    def site(element: str = "Cu", occupied: float = 1, xyz: str = "[0, 0, 0]", more: str = "") -> str:
        species = f'[{{"element": "{element}", "occu": {occupied}}}]'
        return f'{{"sites": [{{"species": {species}, "xyz": {xyz}{more}}}]'

    for name, text, words in (
        ("open", "{", "cut short|JSON"),
        ("a number", "3", "no pymatgen structures"),
        ("null", "null", "no pymatgen structures"),
        ("a word", '"hello"', "no pymatgen structures"),
        ("numbers", "[1, 2]", "no pymatgen structures"),
        ("empty list", "[]", "no structures"),
        ("very deep", "[" * 100_000, "cannot be read"),
        ("number of 5000 digits", f"[{'9' * 5000}]", "cannot be read|JSON"),
        ("no sites", '[{"structure": {"lattice": 1}}]', "structure 0 is not a pymatgen structure: it has no 'sites'"),
        ("empty sites", '{"sites": [], "lattice": null}', "structure 0"),
        ("unknown element", site("Qq") + "}", "site 0 holds 'Qq', which is no element"),
        ("disordered", site(occupied=0.5) + "}", "site 0 is disordered"),
        ("position NaN", site(xyz="[NaN, 0, 0]") + "}", "position of atom 0 is not finite"),
        ("position of two", site(xyz="[0, 0]") + "}", "structure 0"),
        ("lattice of one", site() + ', "lattice": {"matrix": [[1, 0, 0]]}}', "structure 0"),
        ("properties a number", site(more=', "properties": 5') + "}", "structure 0"),
        ("table of others", '{"index": [0], "columns": ["x"], "data": [[1]]}', "no column 'structure'"),
        ("ragged table", '{"index": [0, 1], "columns": ["structure"], "data": [[1]]}', "cannot be read"),
        ("database of nothing", '{"ids": [1], "nextid": 2}', "cannot be read|database"),
    ):
        yield pack_row(name, text, words, "json")
    yield pack_row("UTF-16", "[1]".encode("utf-16"), "not text", "json")
    yield pack_row("lines cut short", site() + '}\n{"si', "cut short|cannot be read", "jsonl")


def formats() -> Iterator[Row]:
    yield pack_row("CIF of words", "once upon", "no structures|cannot be read", "cif")
    yield pack_row("CIF without atoms", "data_x\n_cell_length_a 4\n", "no structures|cannot be read", "cif")
    yield pack_row("POSCAR of words", "hello\n1.0\nx\n", "cannot be read", "vasp")
    poscar = "Cu\n1.0\n4 0 0\n0 4 0\n0 0 4\nCu\n3\nDirect\n0 0 0\n"
    yield pack_row("POSCAR cut short", poscar, "cannot be read", "vasp")
    yield pack_row("no format", "hello", "cannot be read", "dat")
    yield pack_row("pickle", pickle.dumps([1]), "pickles run any code and are never loaded", "pkl")
    yield pack_row("Parquet of bytes", b"PAR1" + bytes(100) + b"PAR1", "damaged or cut short", "parquet")
    yield Row("Parquet cut short", optimade(cut=30), "pack bad.parquet --out OUT", "damaged or cut short")
    others = optimade(species_at_sites=LEFT_OUT)
    yield Row("Parquet of others", others, "pack bad.parquet --out OUT", "no structures in this table")
    for name, changes in (
        ("without atoms", {"species_at_sites": None}),
        ("lattice of one", {"lattice_vectors": [[1.0]]}),
        ("code for an element", {"species_at_sites": ["__import__('os')"]}),
    ):
        yield Row(
            f"Parquet {name}",
            optimade(**changes),
            "pack bad.parquet --out OUT",
            "bad.parquet: .*(read|element|has no species_at_sites)",
        )
    yield pack_row("LMDB of bytes", bytes(16) + bytes.fromhex("dec0efbe") + bytes(100), "LMDB|lmdb", "aselmdb")
    yield pack_row("database of bytes", bytes(range(256)), "database", "db")
    yield Row("database of others", database, "pack bad.db --out OUT", "not one of ASE")
    yield pack_row("trajectory of bytes", bytes(range(256)), "cannot be read", "traj")
    yield Row("trajectory cut short", cut_trajectory, "pack bad.traj --out OUT", "cannot be read")
    atom = "begin\nlattice 4 0 0\nlattice 0 4 0\nlattice 0 0 4\natom 0 0 0 Cu 0 0 0 0 0\nenergy -1\ncharge 0\nend\n"
    for name, text, words in (
        ("no end", atom.replace("end\n", ""), "line 1 is cut short, its 'end' is missing"),
        ("a word", atom.replace("-1", "x"), "line 6: 'x' is not a finite number"),
        ("unknown element", atom.replace("Cu", "Qq"), "'Qq' is no element"),
        ("column missing", atom.replace("Cu 0", "Cu"), "line 5: an atom has 9 values"),
        ("unknown units", "# units stones\n" + atom, "'stones' are not an energy over a length"),
        ("two axes", atom.replace("lattice 0 0 4\n", ""), "lattice"),
        ("no atoms", "begin\nend\n", "without atoms"),
        ("begun twice", "begin\n" + atom, "line 2 begins a structure"),
    ):
        yield pack_row(f"RuNNer: {name}", text, words, "data")
    for name, text, ending in (
        ("vasprun.xml", "<modeling><incar>", "xml"),
        ("OUTCAR", " vasp.6.3.0 18Jan22\n hello\n", "out"),
        ("Quantum ESPRESSO", "     Program PWSCF v.7 starts\n", "out"),
        ("CP2K", " CP2K| version\n", "out"),
        ("GPAW", "  ___ ___ ___ _ _ _\n", "txt"),
        ("gpw", "- of UlmGPAW" + 200 * "\0", "gpw"),
    ):
        yield Row(
            f"{name} cut short",
            file(f"bad.{ending}", text),
            f"pack bad.{ending} --out OUT",
            f"no converged ionic steps.*bad.{ending}",
        )


def sets() -> Iterator[Row]:
    def header(**changes: Any) -> Writer:
        def change(content: dict[str, Any]) -> None:
            content |= changes
            for name in [name for name, value in changes.items() if value is LEFT_OUT]:
                del content[name]

        return packed(header=change)

    def first_shard(**changes: Any) -> Writer:
        return packed(header=lambda content: content["shards"][0].update(changes))

    for name, write, words in (
        ("shard missing", packed(lambda: os.remove(SHARD)), "shard-00001.arrow is missing: copy"),
        ("shard cut short", packed(lambda: file(SHARD, Path(SHARD).read_bytes()[:-9])()), "bytes and should have"),
        ("shard of zeros", packed(zeroed), "shard-00001.arrow is damaged"),
        ("shard of others", packed(other_shard), "shard-00001.arrow is damaged"),
        ("header cut short", packed(lambda: file("set/transfermium.json", "{")()), "file is cut short"),
        ("newer", header(version=99), "by a newer version"),
        ("version a word", header(version="one"), "'version' of transfermium.json is 'one'"),
        ("version missing", header(version=LEFT_OUT), "has no 'version'"),
        ("shards missing", header(shards=LEFT_OUT), "has no 'shards'"),
        ("shards a number", header(shards=5), "'shards' of transfermium.json is 5"),
        ("units a list", header(units=[1]), "'units'"),
        ("count too large", header(n_structures=100), "do not add up"),
        ("counts below zero", first_shard(n_structures=-3), "do not add up"),
        ("counts that lie", packed(header=lambda h: (h["shards"][0].update(n_structures=9), h.update(n_structures=12))),
         "damaged"),
        ("shard is no text", first_shard(file=7), "'file'"),
        ("shard above the folder", lies_at("../outside.arrow"), "does not lie in it"),
        ("shard anywhere", lies_at(""), "does not lie in it"),
        ("shard a link", packed(linked), "does not lie in it"),
    ):  # fmt: skip
        yield Row(name, write, "pack set --out OUT", f"set.*({words})")


def models() -> Iterator[Row]:
    def info(name: str, write: Writer, words: str) -> Row:
        return Row(name, write, "info m.safetensors", f"m.safetensors.*({words})")

    def zipped() -> None:
        with zipfile.ZipFile("m.safetensors", "w") as archive:
            archive.writestr("data.pkl", "x")

    def foreign() -> None:
        safetensors.torch.save_file({"weight": torch.zeros(3)}, "m.safetensors", {"format": "pt"})

    whole = model_bytes()
    incomplete = "is not a complete safetensors file"
    yield Row("missing", nothing, "info m.safetensors", "there is no file m.safetensors")
    yield Row("folder of nothing", lambda: Path("m").mkdir(), "info m", "there is no file m/model.safetensors")
    yield info("empty", file("m.safetensors", ""), incomplete)
    yield info("text", file("m.safetensors", "hello"), incomplete)
    yield info("zip of torch", zipped, "is a pickle, as torch.save writes them")
    yield info("pickle", file("m.safetensors", pickle.dumps({"weight": 1})), "is a pickle, as torch.save writes them")
    yield info("of somebody else", foreign, "is not a transfermium model")
    yield info("cut short", file("m.safetensors", whole[:-100]), incomplete)
    yield info("header cut short", file("m.safetensors", whole[:100]), incomplete)
    yield info("header of a terabyte", file("m.safetensors", (10**12).to_bytes(8, "little") + whole[8:]), incomplete)
    yield info("card no JSON", model(lambda card: "hello"), "no readable card")
    yield info("card very deep", model(lambda card: "[" * 100_000), "no readable card")
    for value in (0, 99, "one", None, [1], True):
        yield info(f"format {value!r}", entry(value, "format"), "has file format .*: update transfermium")
    yield info("format missing", entry(LEFT_OUT, "format"), "no readable card")
    for name in ("backbone", "outputs", "dtype"):
        for value in (5, None, [1], LEFT_OUT):
            said = f"its card has no '{name}'" if value is LEFT_OUT else f"'{name}' of its card"
            yield info(f"{name} {'missing' if value is LEFT_OUT else value}", entry(value, name), said)
    yield info("dtype of no kind", entry("complex1", "dtype"), "damaged or from another version: 'complex1'")
    for value, words in (
        ("Net", "class Net is not known here"),
        ("os.system", "class os.system is not known here"),
        ("EnergyHead", "class EnergyHead is not known"),
        (["PaiNN"], "'class' of 'backbone'"),
    ):
        yield info(f"backbone {value}", entry(value, "backbone", "class"), words)
    yield info("head a backbone", entry("PaiNN", "outputs", "energy", "class"), "class PaiNN is not known here")
    yield info("derivative of nothing", entry("x", "outputs", "forces", "arguments", "of"), "derives 'x'")
    yield info("derivative of a list", entry(["x"], "outputs", "forces", "arguments", "of"), "damaged")
    yield info("unknown argument", entry(3, "backbone", "arguments", "colour"), "unexpected keyword argument 'colour'")
    yield info("arguments a list", entry([1], "backbone", "arguments"), "'arguments' of 'backbone'")
    larger = "describes a larger model than it holds|more than it can hold"
    for name, value, words in (
        ("width", 10**9, larger),
        ("width", 10**30, larger),
        ("width", 16, "larger model|tensor"),
        ("width", 4, "tensor .* but the card needs"),
        ("width", "8", "damaged"),
        ("width", -1, "width is -1"),
        ("width", None, "damaged"),
        ("depth", 10**9, larger),
        ("depth", 9_999, larger),
        ("depth", 2, "is missing"),
        ("depth", -1, "depth of PaiNN is -1"),
        ("radial", 10**10, larger),
        ("elements", 10**10, larger),
        ("cutoff", 1e9, larger),
        ("cutoff", 1e3, "a cutoff of 1000.0 Å makes no sense"),
        ("inputs", [f"x{k}" for k in range(10_000)], larger),
        ("inputs", 5, "damaged"),
    ):
        yield info(f"{name} {str(value)[:12]}", entry(value, "backbone", "arguments", name), words)
    for cls, arguments, words in (
        ("ET", {"heads": 0}, "0 heads attend to nothing"),
        ("ET", {"heads": -8}, "-8 heads attend to nothing"),
        ("CGCNN", {"cutoff": 1e-300}, "damaged"),
    ):
        yield info(f"{cls} of {arguments}", entry({"class": cls, "arguments": arguments}, "backbone"), words)
    first = "backbone.node_inputs.element.weight"
    for name, change, words in (
        ("missing", lambda t: {n: x for n, x in t.items() if n != first}, f"{first} is missing"),
        ("too many", lambda t: {**t, "more": torch.zeros(3)}, "knows no tensor more"),
        ("of another shape", lambda t: {**t, first: t[first][1:].clone()}, f"{first} is .* but the card needs"),
        ("of integers", lambda t: {**t, first: t[first].long()}, "of int64, but the card needs"),
        ("NaN", lambda t: {**t, first: t[first] * torch.nan}, f"{first} has values that are not finite"),
        ("too large", lambda t: {**t, first: t[first].double() * 1e300}, f"{first} has values that are not finite"),
    ):
        yield info(f"tensor {name}", model(tensors=change), words)
    for name in (
        *("elements", "elements in last stage", "history", "labels", "levels", "metrics", "objective", "quantities"),
        *("references (eV)", "parts", "uncertainty", "provenance"),
    ):
        for value in (5, "x", [5]):
            yield info(f"{name} {value}", entry(value, name), re.escape(f"'{name}' of its card"))
    for value in (5, {"energy": 5}, {"energy": {"output": 5}}):
        said = re.escape("'targets' of 'uncertainty' of its card")
        yield info(f"uncertainty of {value}", entry({"targets": value}, "uncertainty"), said)
    yield info("unknown element", entry(3, "elements", "Qq"), "element 'Qq'")
    yield info("history of words", entry(["x"], "history"), "is 'x', which is not of the kind")
    yield info("labels without keys", entry([{"quantity": "energy"}], "labels", "labels"), "has no 'keys'")
    unknown = entry("Nope", "objective", "class")
    yield Row("unknown objective", unknown, "evaluate m.safetensors a.extxyz", "class Nope is not known")
    other = entry({"x": 1}, "objective", "arguments")
    yield Row(
        "objective of others", other, "evaluate m.safetensors a.extxyz", "objective in the model's card cannot be"
    )


TRAIN = "pretrain a.extxyz --objective Potential --backbone PaiNN --backbone.width 4 --steps 1 --out OUT"


def configs() -> Iterator[Row]:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcde", "bcdef", strict=True)
    )
    for name, text, words in (
        ("open bracket", "steps: [1", "parsing config c.yaml"),
        ("tabs", "\tsteps: 1", "parsing config c.yaml"),
        ("a list", "- 1\n- 2\n", "parsing config c.yaml"),
        ("a number", "5", "parsing config c.yaml"),
        ("unknown option", "stepz: 5", "no option '?stepz.*; did you mean"),
        ("a word for a number", "lr: fast", "--lr is fast, but must be float"),
        ("a list for a number", "lr: [1, 2]", "lr"),
        ("nothing for a number", "edges: null", "edges is None, but must be above zero"),
        ("a word for a width", "backbone: {class_path: PaiNN, init_args: {width: wide}}", "width is wide"),
        ("a tag that runs", "steps: !!python/object/apply:os.system ['touch pwned']", "parsing config c.yaml"),
        ("a tag that names", "lr: !!python/name:os.system", "parsing config c.yaml"),
        ("any class", "objective: {class_path: subprocess.Popen, init_args: {args: 'touch pwned'}}", "objective"),
        ("any function", "objective: {class_path: os.system}", "objective"),
        ("grows without end", bomb, "option|config"),
        ("bytes", bytes(range(256)), "c.yaml: this is not text"),
        ("UTF-16", "steps: 1".encode("utf-16"), "c.yaml: this is not text"),
    ):
        yield Row(name, file("c.yaml", text), f"{TRAIN} --config c.yaml", words)
    yield Row("folder", lambda: Path("c.yaml").mkdir(), f"{TRAIN} --config c.yaml", "c.yaml")


def splits() -> Iterator[Row]:
    whole = {"train": [0, 1, 2, 3], "valid": [4, 5], "test": None, "by": "random", "reason": "", "groups": 6}
    damaged = "split.json names a structure twice, or one that is not there"
    for name, changes, words in (
        ("other data", {"total": 9}, "split.json splits 9 structures, but there are 6"),
        ("below zero", {"train": [-1, 0]}, damaged),
        ("beyond the data", {"train": [0, 77]}, damaged),
        ("in two sides", {"train": [0, 4]}, damaged),
        ("given twice", {"train": [0, 0, 1]}, damaged),
        ("words", {"train": ["a"]}, "split.json: not a split"),
        ("fractions", {"train": [0.5]}, "split.json: not a split"),
        ("nothing to train on", {"train": []}, "split.json leaves no structure"),
    ):
        text = json.dumps({**whole, "total": 6, **changes})
        yield Row(name, file("split.json", text), f"{TRAIN} --split-by split.json", words)
    for name, text in (("open", "{"), ("a list", "[1]"), ("half", '{"train": [0]}')):
        yield Row(name, file("split.json", text), f"{TRAIN} --split-by split.json", "split.json: not a split")
    yield Row("missing", nothing, f"{TRAIN} --split-by none.json", "none.json: no such split")


EVALUATE = "evaluate potential.safetensors a.extxyz"
PREDICT = "predict potential.safetensors a.extxyz"
SUGGEST = "suggest potential.safetensors a.extxyz --out s.extxyz --n 2"
TUNE = "finetune potential.safetensors a.extxyz --objective Potential --steps 1 --out OUT"
MOVE = "md potential.safetensors a.extxyz --index 0 --out OUT --time 2steps --every 1steps"
RELAX = "relax potential.safetensors a.extxyz --out r.extxyz --steps 1"
BAKEOFF = "bakeoff many.extxyz --target many.extxyz --property gap --out OUT"
CURVE = "curve many.extxyz --objective Potential --base potential.safetensors --out OUT"
OPTIONS = (  # verb, option, words
    (EVALUATE, "--edges 0", "edges is 0, but must be above zero"),
    (EVALUATE, "--device abacus", "device 'abacus' cannot be used"),
    (EVALUATE, "--part x", "no part 'x'"),
    (EVALUATE, "--label energy=energy --label energy=x", "--label energy=... is given twice"),
    (PREDICT, "--out p.cif", "p.cif ends in '.cif'"),
    (PREDICT, "--out taken.csv", "taken.csv is a folder: give the name of a file"),
    (PREDICT, "--out a.extxyz/x.csv", "a.extxyz.*(Not a directory|File exists)"),
    (PREDICT, "--out p.csv --interval 2", "the interval is 2.0, but must be a probability"),
    (PREDICT, "--out p.csv --edges -3", "edges is -3, but must be above zero"),
    (PREDICT, "--out p.csv --label x=y", "'x' is not needed"),
    ("features potential.safetensors a.extxyz", "--out f.txt", "f.txt ends in '.txt'"),
    ("features potential.safetensors a.extxyz", "--out taken.csv", "taken.csv is a folder: give the name of a file"),
    (SUGGEST, "--out s.csv", "s.csv is not an .extxyz file"),
    (SUGGEST, "--n 0", "n is 0, but must be between 1 and the 6 structures"),
    (SUGGEST, "--method magic", "there is no method 'magic'"),
    (SUGGEST, "--labelled none.xyz", "none.xyz: no such file"),
    ("leaks a.extxyz", "--held-out none.xyz", "none.xyz: no such file"),
    ("leaks a.extxyz", "--held-out a.extxyz --tolerance nan", "tolerance"),
    ("pack a.extxyz", "--out note", "note exists and is no packed set"),
    ("pack a.extxyz", "--out a.extxyz/x", "a.extxyz.*(Not a directory|File exists)"),
    ("pack a.extxyz", "--out OUT --provenance x=y", "provenance"),
    ("pack a.extxyz", "--out OUT --unit energy=miles", "unknown unit 'miles' of energy"),
    ("pack a.extxyz", "--out OUT --label energy=zzz", "no structure has 'zzz' for 'energy'"),
    (TRAIN, "--out note", "note is a file: choose a folder"),
    (TRAIN, "--out a.extxyz/x", "a.extxyz"),
    (TRAIN, "--edges 0", "edges is 0, but must be above zero"),
    (TRAIN, "--lr nan", "lr is nan, but must be"),
    (TRAIN, "--seed -1", "seed is -1, but must not be negative"),
    (TRAIN, "--valid-fraction nan", "valid_fraction is nan"),
    (TRAIN, "--valid none.xyz", "none.xyz: no such file"),
    (TRAIN, "--valid empty.extxyz", "empty.extxyz: the file is empty"),
    (TRAIN, "--held-out a.extxyz", "every structure to train on is also held out"),
    (TRAIN, "--split-by nokey", "no structure has 'nokey'"),
    (TRAIN, "--level HSE", "HSE"),
    (TRAIN, "--ema 2", "warmup and ema are fractions"),
    (TRAIN, "--time 0s", "time is '0s', but must be above zero"),
    (TRAIN, "--steps 0.5", "--steps is 0.5, but must be int"),
    (TRAIN, "--accumulate 0", "accumulate is 0"),
    (TRAIN, "--teacher nomodule:f", "nomodule"),
    (TRAIN, "--teacher a.extxyz", "a.extxyz is not a complete safetensors file"),
    (TRAIN, "--backbone.width 0", "width is 0, but must be at least one"),
    (TRAIN, "--backbone.width -4", "width is -4, but must be at least one"),
    (TRAIN, "--backbone.depth -1", "depth of PaiNN is -1, but must not be negative"),
    (TRAIN, "--backbone.radial 0", "a basis of 0 functions"),
    (TRAIN, "--backbone.elements 1", "element 79 is beyond this model's table of 1 elements"),
    (TRAIN, "--backbone.cutoff nan", "cutoff is nan, but must be"),
    (TRAIN, "--objective.forces nan", "forces"),
    (TRAIN, "--provenance magic=1", "magic"),
    (TUNE, "--strategy magic", "there is no strategy 'magic'"),
    (TUNE, "--rank 0 --strategy lora", "rank is 0"),
    (TUNE, "--unseen maybe", "maybe"),
    (TUNE, "--strategy replay", "strategy 'replay' needs what to replay"),
    (TUNE, "--ledger none.xyz", "none.xyz: no such file"),
    (TUNE, "--align maybe", "align"),
    (MOVE, "--ensemble nph", "nph"),
    (MOVE, "--temperature nan", "temperature"),
    (MOVE, "--timestep 5", "5"),
    (MOVE, "--time soon", "'soon'"),
    (MOVE, "--index 99", "there is no structure 99: a.extxyz has 6"),
    (MOVE, "--pairs Cu-Cu", "pairs are those compared with a reference"),
    (MOVE, "--most-force -1", "most_force is -1.0, but must be above zero"),
    (MOVE, "--seed -1", "seed is -1, but must not be negative"),
    (MOVE, "--out a.extxyz", "a.extxyz is a file: choose a folder"),
    (RELAX, "--fmax nan", "fmax"),
    (RELAX, "--optimizer magic", "there is no optimizer 'magic'"),
    (RELAX, "--engine magic", "there is no engine 'magic'"),
    (RELAX, "--out r.cif", "r.cif ends in '.cif'"),
    (RELAX, "--out a.extxyz", "a.extxyz exists"),
    (TRAIN.replace("Potential", "Removal"), "--seed 0", "there is no objective 'Removal', only (?!.*(Parts|Removal))"),
    (
        TRAIN.replace("a.extxyz", "free.extxyz"),
        "--objective.stress 1.0",
        "no structure is periodic in three directions",
    ),
    (TRAIN.replace("Potential", "Denoise").replace("a.ext", "free.ext"), "--objective.strain 0.02", "strain is to be"),
    (
        TRAIN.replace("a.extxyz", "one=a.extxyz").replace("Potential", "Together"),
        "--objective.parts '{one: {class_path: Denoise}, two: {class_path: Potential}}'",
        "the part 'two' has no structures: give them as two=FILE",
    ),
    (TRAIN.replace("a.extxyz", "a.extxyz wrong.extxyz"), "--seed 1", "wrong.extxyz: structure 1: .*not finite"),
    (BAKEOFF, "--label gapp=gap", "--label gapp=... is of nothing that is learned here: name one of energy"),
    (BAKEOFF, "--base-unit gap=eV", "--base-unit gap=... is of nothing that is learned here"),
    (BAKEOFF, "--seeds 0", "seeds is 0"),
    (BAKEOFF, "--sizes many", "--sizes has 'many', which is no whole number"),
    (BAKEOFF, "--sizes 0", "0 is no number of labels"),
    (BAKEOFF, "--sizes 500", "gap has 43 structures to train on, not 500"),
    (BAKEOFF, "--arms magic", "magic"),
    (BAKEOFF, "--pretraining soon", "'soon' is not a time"),
    (BAKEOFF, "--rates -1", "lr is -1.0, but must be above zero"),
    (BAKEOFF, "--edges 0", "edges is 0"),
    (BAKEOFF, "--workers 0", "workers is 0"),
    (BAKEOFF, "--test none.xyz", "none.xyz: no such file"),
    (BAKEOFF, "--property nope", "no structure has 'nope'"),
    (CURVE, "--sizes x", "--sizes has 'x', which is no whole number"),
    (CURVE, "--sizes 900", "labels to train on, not 900"),
    (CURVE, "--arms magic", "there is no arm 'magic'"),
    (CURVE, "--budget soon", "'soon' is not a time"),
    (CURVE, "--target 5miles", "unit miles"),
    (CURVE, "--cost-per-label much", "'much' is not a time"),
    (CURVE, "--margin -1", "margin is -1.0, but must be above zero"),
    (CURVE, "--rates 0", "lr is 0.0, but must be above zero"),
    (CURVE, "--base none", "there is no file none"),
    (CURVE, "--base-data a.extxyz", "give one of them, not both"),
    ("demo", "--out a.extxyz", "a.extxyz"),
)


def options() -> Iterator[Row]:
    def write() -> None:
        Path("taken.csv").mkdir()
        file("note", "x")()
        file("empty.extxyz", "")()
        free, wrong = alloys(4), alloys(4, seed=9)
        for atoms in free:
            atoms.pbc = False
        wrong[1].calc.results["energy"] = math.nan
        ase.io.write("free.extxyz", free)
        ase.io.write("wrong.extxyz", wrong)

    for command, option, words in OPTIONS:
        kept = "OUT/data" if command in (BAKEOFF, CURVE) else ""
        yield Row(f"{command.split()[0]} {option}", write, f"{command} {option}", words, kept)


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file("a.extxyz", good())()
    file("many.extxyz", good(60))()
    file("potential.safetensors", model_bytes())()
    return tmp_path


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row.name)
def test_bad_input_gives_one_sentence_and_leaves_nothing(
    folder: Path, row: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    row.write()
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(shlex.split(row.command))
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert stopped.value.code == 2, last
    assert [line for line in said.err.splitlines() if line.startswith("error: ")] == [last]
    assert "Traceback" not in said.err and said.out == ""
    assert len(last) < 600 and re.search(row.words, last), last
    after = contents(folder)
    new = [path for path in after if path not in before]
    assert not [path for path in new if not row.kept or not (row.kept + "/").startswith(path[: len(row.kept) + 1])]
    assert {path: after[path] for path in before} == before


def test_there_are_many_rows_and_each_has_a_name() -> None:
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pack bad.extxyz --out OUT", "bad.extxyz: structure 0: the position of atom 0 is not finite"),
        ("info a.extxyz", "a.extxyz is not a complete safetensors file"),
        (f"{TRAIN} --config bad.extxyz", "bad.extxyz"),
    ],
)
def test_so_does_the_program(folder: Path, command: str, words: str) -> None:
    file("bad.extxyz", frame("Cu nan 0 0"))()
    done = program(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and words in done.stderr.splitlines()[-1]


def test_the_traceback_is_there_for_those_who_ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("info a.extxyz --debug", "info a.extxyz --typo --debug"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(shlex.split(command))
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert "Traceback" in said and said.splitlines()[-1].startswith("error: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pack secret.extxyz --out OUT", "secret.extxyz.*Permission denied"),
        ("info secret.safetensors", "secret.safetensors.*Permission denied"),
        ("pack a.extxyz --out locked/OUT", "locked.*Permission denied"),
        (f"{PREDICT} --out locked/p.csv", "locked.*Permission denied"),
    ],
)
def test_what_may_not_be_read_or_written_is_named(
    folder: Path, command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("secret.extxyz", "secret.safetensors"):
        file(name, good())()
        Path(name).chmod(0)
    Path("locked").mkdir(mode=0o500)
    with pytest.raises(SystemExit) as stopped:
        cli.main(shlex.split(command))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and re.search(words, last), last


def test_a_byte_order_mark_and_spaces_are_no_mistakes(folder: Path) -> None:
    file("marked.extxyz", "\ufeff   " + good())()
    assert len(tm.read("marked.extxyz")) == 6


def contents(folder: Path) -> dict[str, bytes | None]:
    """Paths of all files and folders, with what is in them."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in paths}


def program(command: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "transfermium", *shlex.split(command)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)
