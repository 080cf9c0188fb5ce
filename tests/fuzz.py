"""Damaged copies of sound files, and what reading them may come to: structures, or one sentence."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors.torch
from hypothesis import strategies as st

import transfermium as tm
from tests.alloys import alloys
from transfermium.errors import InputError

Change = Callable[[bytes], bytes]
WORDS = (
    b"1e999",
    b"-1",
    b"0",
    b"nan",
    b"1000000000000",
    b"1e-320",
    b"Xx",
    b"null",
    b"[]",
    b"{}",
    b"\xff",
    b"\x00",
    b'"',
)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One to three changes of a file: bytes flipped or lost, its end cut off, lines twice, numbers replaced."""
    steps = [
        draw(st.sampled_from((_flip, _cut, _lose, _repeat, _replace, _replace)))(draw)
        for _ in range(draw(st.integers(1, 3)))
    ]

    def change(content: bytes) -> bytes:
        for step in steps:
            content = step(content)
        return content

    return change


def _at(draw: st.DrawFn) -> float:
    return draw(st.floats(0, 1, exclude_max=True, allow_subnormal=False))


def _flip(draw: st.DrawFn) -> Change:
    where, value = _at(draw), draw(st.integers(1, 255))

    def flip(content: bytes) -> bytes:
        i = int(where * len(content))
        return content[:i] + bytes(byte ^ value for byte in content[i : i + 1]) + content[i + 1 :]

    return flip


def _cut(draw: st.DrawFn) -> Change:
    where = _at(draw)
    return lambda content: content[: int(where * len(content))]


def _lose(draw: st.DrawFn) -> Change:
    where, n = _at(draw), draw(st.integers(1, 40))
    return lambda content: content[: int(where * len(content))] + content[int(where * len(content)) + n :]


def _repeat(draw: st.DrawFn) -> Change:
    where, times = _at(draw), draw(st.integers(2, 5))

    def repeat(content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        i = int(where * len(lines))
        return b"".join(lines[:i] + times * lines[i : i + 1] + lines[i + 1 :])

    return repeat


def _replace(draw: st.DrawFn) -> Change:
    """A number or word by another, worse one."""
    where, word = _at(draw), draw(st.sampled_from(WORDS))

    def replace(content: bytes) -> bytes:
        found = list(re.finditer(rb"[\w.+-]+", content))
        if not found:
            return content
        one = found[int(where * len(found))]
        return content[: one.start()] + word + content[one.end() :]

    return replace


# ------------------------------------------------------------------------------------------------- what is damaged


@functools.cache
def sound() -> dict[str, bytes]:
    """Name to content of a small file of each format that is read here, and of a model."""
    structures = alloys(3)
    text = io.StringIO()
    ase.io.write(text, structures, format="extxyz")
    runner = "".join(
        "begin\n"
        + "".join(f"lattice {x} {y} {z}\n" for x, y, z in atoms.cell.array)
        + "".join(
            f"atom {x} {y} {z} {s} 0 0 0 0 0\n" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)
        )
        + "energy -1.5\ncharge 0\nend\n"
        for atoms in structures
    )
    sites = [
        {
            "lattice": {"matrix": atoms.cell.array.tolist()},
            "sites": [
                {"species": [{"element": s, "occu": 1}], "xyz": p.tolist()}
                for s, p in zip(atoms.symbols, atoms.positions, strict=True)
            ],
        }
        for atoms in structures
    ]
    files = {
        "a.extxyz": text.getvalue().encode(),
        "a.data": ("# units eV/Å\n" + runner).encode(),
        "a.json": json.dumps([{"structure": one, "gap": 1.5} for one in sites]).encode(),
        "a.vasp": _written(structures[0], "vasp"),
        "a.cif": _written(structures[0], "cif"),
        "a.parquet": _parquet(structures),
        "id.csv": b"id,gap,note\n0,1.5,x\n1,2.5,y\n2,,z\n",
        "m.safetensors": _model(),
    }
    return files


def _written(atoms: ase.Atoms, form: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        ase.io.write(f"{folder}/a", atoms, format=form)
        return Path(folder, "a").read_bytes()


def _parquet(structures: list[ase.Atoms]) -> bytes:
    rows = {
        "species_at_sites": [list(atoms.symbols) for atoms in structures],
        "lattice_vectors": [atoms.cell.array.tolist() for atoms in structures],
        "cartesian_site_positions": [atoms.positions.tolist() for atoms in structures],
    }
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(rows), sink)
    return sink.getvalue()


def _model() -> bytes:
    backbone = tm.PaiNN(width=2, depth=1, radial=2, elements=79)
    model = tm.Model(backbone, {"energy": tm.EnergyHead(2), "forces": tm.Gradient("energy")}, {"elements": {"Cu": 3}})
    card = json.dumps({"format": 1, **model.architecture(), **model.card})
    return safetensors.torch.save(model.state_dict(), {"transfermium": card})


@functools.cache
def sound_set() -> dict[str, bytes]:
    """The files of a packed set."""
    with tempfile.TemporaryDirectory() as folder:
        tm.data.pack(alloys(4), Path(folder, "set"), shard_size=2, progress=False)
        return {path.name: path.read_bytes() for path in sorted(Path(folder, "set").iterdir())}


# ----------------------------------------------------------------------------------------------------- what is done


def read_damaged(name: str, content: bytes, folder: Path) -> str:
    """Read a damaged file; returns "read", or the sentence. Any other exception is a defect."""
    if name == "id.csv":
        for k, atoms in enumerate(alloys(3)):
            ase.io.write(folder / f"{k}.xyz", atoms, format="extxyz")
    path = folder / name
    path.write_bytes(content)
    try:
        if name == "m.safetensors":
            tm.load(path)
        else:
            _look_at(tm.read(folder if name == "id.csv" else path))
    except InputError as error:
        return sentence(error)
    finally:
        path.unlink()
    return "read"


def read_damaged_set(name: str, content: bytes, folder: Path) -> str:
    """The same of a packed set, one of whose files is damaged."""
    path = folder / "set"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    files = {**sound_set(), name: content}
    if name.endswith(".arrow"):  # what the header says of sizes would find it at once
        header = json.loads(files["transfermium.json"])
        next(shard for shard in header["shards"] if shard["file"] == name)["bytes"] = len(content)
        files["transfermium.json"] = json.dumps(header).encode()
    for file, own in files.items():
        (path / file).write_bytes(own)
    try:
        _look_at(tm.read(path))
    except InputError as error:
        return sentence(error)
    return "read"


def sentence(error: InputError) -> str:
    """The message, which must be one that a person can read."""
    text = str(error)
    assert text.strip() and len(text) < 2_000, text[:200]
    return text


def _look_at(structures: object) -> None:
    assert isinstance(structures, list | tuple) or hasattr(structures, "__getitem__")
    for atoms in structures:  # type: ignore[attr-defined]
        assert len(atoms) > 0 and np.isfinite(atoms.positions).all()


@contextmanager
def bounded_memory(gigabytes: float = 8) -> Iterator[None]:
    """Where a header makes somebody ask for more, a MemoryError follows."""
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
