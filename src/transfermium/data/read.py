"""`read` and `stream`: from files, folders and tables to structures, in memory or one by one."""

import csv as csv_format
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ase import Atoms

from ..errors import InputError
from . import calculations
from .formats import check, plain_name, read_file, stream_file
from .runner import is_runner
from .sequences import MEMORY, Joined

log = logging.getLogger(__name__)

Source = str | Path | Atoms | Sequence["Source"] | Sequence[Atoms]

SETS = {".aselmdb", ".db", ".extxyz", ".json", ".jsonl", ".lmdb", ".parquet"}  # of many structures
ENDINGS = SETS | {
    ".cell", ".cif", ".con", ".contcar", ".gen", ".pdb", ".poscar", ".res", ".sdf", ".traj", ".vasp", ".xsf", ".xyz",
}  # fmt: skip
VASP = re.compile(r"(POSCAR|CONTCAR)[._-]?", re.IGNORECASE)
MISSING = {"", "nan", "none", "null", "na", "n/a"}


def read(*sources: Source, csv: str | Path | None = None) -> Sequence[Atoms]:
    """Read structures from any number of sources and put them one after the other.

    A source is a file (extended XYZ, ASE database, JSON of pymatgen structures, MatBench table, one of the public sets
    in `data.public`, `input.data` of RuNNer or n2p2, an output of VASP, Quantum ESPRESSO, CP2K or GPAW, or anything
    that `ase.io.read` knows; also compressed by gzip, xz or bzip2), a folder of such files, a folder of single
    structures with a table of values (a CSV file in it, or `csv`), a folder tree of calculations, a packed set,
    structures in memory, or a list of sources.

    Columns of the table become `atoms.info`: numbers as float, an empty cell as no entry. A packed set stays on disk.

    Raises:
        InputError: naming the file, the structure and the cause.
    """
    parts = _parts(sources, csv)
    sequences = [part.structures if isinstance(part.structures, Sequence) else [*part.structures] for part in parts]
    structures = sequences[0] if len(parts) == 1 else Joined(sequences, [part.name for part in parts])
    if len(structures) == 0:
        raise InputError("nothing to read: the sources hold no structures")
    return structures


def stream(*sources: Source, csv: str | Path | None = None) -> Iterator[Atoms]:
    """The structures that `read` would give, one by one, so that files may be larger than memory.

    A source that is missing is an error at once, one that cannot be used when its turn comes. Extended XYZ, ASE
    databases, public sets, files of RuNNer and trajectories, also compressed, packed sets and folders of files are
    read as they are needed; other formats one file at a time.

    Raises:
        InputError: naming the file, the structure and the cause.
    """
    return chain.from_iterable(part.structures for part in _parts(sources, csv))


class Part(NamedTuple):
    """Where structures came from, and the structures: a sequence, or an iterator that reads them when asked."""

    name: str
    structures: Iterable[Atoms]
    has_table: bool = False


def _parts(sources: Sequence[object], csv: str | Path | None) -> list[Part]:
    parts = list(_source_parts(sources, Path(csv) if csv is not None else None))
    if not parts:
        raise InputError("nothing to read: give files, folders or structures")
    if csv is not None and not any(part.has_table for part in parts):
        raise InputError(f"{csv}: a table of values belongs to a folder of structures; give that folder as the source")
    return parts


def _source_parts(source: object, csv: Path | None) -> Iterator[Part]:
    if isinstance(source, str | Path):
        yield from _path_parts(Path(source).expanduser(), csv)
    elif isinstance(source, Atoms):
        yield from _source_parts([source], csv)
    elif isinstance(source, list | tuple) and source and all(isinstance(item, Atoms) for item in source):
        for index, atoms in enumerate(source):
            check(atoms, f"structure {index}")
        yield Part(MEMORY, source)
    elif isinstance(source, list | tuple):
        for item in source:
            yield from _source_parts(item, csv)
    elif isinstance(source, Sequence):  # lazy: whoever made it has checked it
        yield Part(MEMORY, source)
    else:
        raise InputError(f"cannot read from {type(source).__name__}: give paths, or structures in a list")


def _path_parts(path: Path, csv: Path | None) -> Iterator[Part]:
    if not path.exists():
        raise InputError(_missing(path))
    if path.is_file():
        yield Part(path.name, stream_file(path))
        return

    from .pack import PackedSet, is_packed

    if is_packed(path):
        yield Part(path.name, PackedSet.open(path))
    else:
        yield from _folder_parts(path, csv)


def _missing(path: Path) -> str:
    """Name the first part of a path that is not there, and what is there instead."""
    missing = next(part for part in [*reversed(path.parents), path] if not part.exists())
    names = sorted(entry.name for entry in missing.parent.iterdir()) if missing.parent.is_dir() else []
    close = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{path}: no such file or folder ({missing.name!r} is not in {missing.parent.resolve()}){hint}"


# ---------------------------------------------------------------------------------------------------------- folders


def _folder_parts(folder: Path, csv: Path | None) -> Iterator[Part]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.suffix.lower() == ".csv"]
    outputs = [] if csv is not None else _outputs(folder, files, has_table=bool(tables))
    if outputs:
        log.info("%s: reading %d outputs of calculations", folder, len(outputs))
        yield Part(folder.name, calculations.stream(folder, outputs))
        return
    if csv is None and len(tables) > 1:
        names = ", ".join(file.name for file in tables[:5])
        raise InputError(
            f"{folder}: one table can give the values, and there are {len(tables)} CSV files ({names}); "
            f"leave one CSV file in the folder, or give csv= in Python"
        )
    if csv is not None or tables:
        table = csv if csv is not None else tables[0]
        if not table.is_file():
            raise InputError(_missing(table))
        structures = _table_structures(folder, table, [file for file in files if file not in tables])
        yield Part(folder.name, structures, has_table=True)
        return

    candidates = [file for file in files if _is_structure(file)]
    readable = [file for file in candidates if not _is_json(file)] or candidates  # beside others JSON is about them
    if not readable:
        folders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        hint = f"; it has the folders {', '.join(folders[:5])}, read one of them" if folders else ""
        raise InputError(f"{folder}: no structure files in this folder{hint}")
    left = [file.name for file in files if file not in readable]
    log.info(
        "%s: reading %s; leaving out %s", folder, ", ".join(file.name for file in readable), ", ".join(left) or "none"
    )
    for file in readable:
        yield Part(file.name, _named(file))


def _named(file: Path) -> Iterator[Atoms]:
    """The structures of one file among others, which say where they came from."""
    for atoms in stream_file(file):
        atoms.info.setdefault("file", file.name)
        yield atoms


def _outputs(folder: Path, files: list[Path], has_table: bool) -> list[calculations.Calculation]:
    """Outputs of calculations, where the folder is one of calculations: structure files in it go with them.

    That is so when outputs lie beside the structures (as CONTCAR beside OUTCAR), or only in folders below; not when
    sets of many structures do, or structures with a table.
    """
    structures = [file for file in files if _is_structure(file)]
    single = [file for file in structures if not VASP.match(file.name)]
    if (has_table and single) or any(_is_set(file) for file in structures):
        return []
    beside = not structures or calculations.find(folder, deep=False)
    return calculations.find(folder) if beside else []


def _is_set(file: Path) -> bool:
    suffix = Path(plain_name(file)).suffix.lower()
    return suffix in SETS or (suffix == ".data" and is_runner(file))  # LAMMPS has the same ending


def _is_structure(file: Path) -> bool:
    suffix = Path(plain_name(file)).suffix.lower()
    return suffix in ENDINGS or VASP.match(file.name) is not None or _is_set(file)


def _is_json(file: Path) -> bool:
    return plain_name(file).lower().endswith(".json")


# ---------------------------------------------------------------------------------------------- folder with a table


def _table_structures(folder: Path, table: Path, files: list[Path]) -> Iterator[Atoms]:
    """Yield one structure per row, in the order of the rows, with the values of the row in its info."""
    files_of = _files_by_name(files)
    columns, rows = _rows(table, files_of)
    key = max(_id_columns(columns), key=lambda i: sum(_name(row[i]) in files_of for row in rows))
    names = [_name(row[key]) for row in rows]

    lost = [row[key] for row, name in zip(rows, names, strict=True) if name not in files_of]
    if len(lost) == len(rows):
        raise InputError(
            f"{table}: none of its {len(rows)} rows names a structure file in {folder} (first row: {lost[0]!r}); "
            f"give ids in the first column, or read the files without the table by naming them"
        )
    matched = {file for name in names for file in files_of.get(name, [])}
    unused = [file.name for file in files if file not in matched and _is_structure(file) and not _is_json(file)]
    if lost or unused:
        complaints = []
        if lost:
            complaints.append(f"{len(lost)} rows without a structure file ({_first(lost)})")
        if unused:
            complaints.append(f"{len(unused)} structure files without a row ({_first(unused)})")
        raise InputError(f"{table}: {' and '.join(complaints)} in {folder}; add or remove them")

    seen: dict[str, int] = {}
    for line, (row, name) in enumerate(zip(rows, names, strict=True), start=1):
        if len(files_of[name]) > 1:
            raise InputError(f"{table}: {row[key]!r} fits several files ({_first([f.name for f in files_of[name]])})")
        file = files_of[name][0]
        if file.name in seen:
            raise InputError(f"{table}: rows {seen[file.name]} and {line} both name {file.name}; keep one")
        seen[file.name] = line
        structures = read_file(file)
        if len(structures) != 1:
            raise InputError(f"{file}: {len(structures)} structures for one row of {table.name}; keep one in the file")
        atoms = structures[0]
        for i, (column, cell) in enumerate(zip(columns, row, strict=True)):
            if cell.strip().lower() not in MISSING:
                atoms.info[column] = cell.strip() if i == key or _is_id(column) else _value(cell)
        yield atoms


def _files_by_name(files: list[Path]) -> dict[str, list[Path]]:
    """Every name by which a table may call a file: whole, without compression, without ending, without POSCAR."""
    found: dict[str, list[Path]] = {}
    for file in files:
        plain = plain_name(file)
        names = {file.name, plain, Path(plain).stem, VASP.sub("", plain, count=1)}
        for name in names - {""}:
            found.setdefault(name, []).append(file)
    return found


def _rows(table: Path, files_of: dict[str, list[Path]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table; without a header (as in CGCNN's id_prop.csv) the columns are id, target, ..."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{table}: this is not UTF-8 text ({error}); save it as UTF-8") from error
    first = text.strip().split("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        rows = [row for row in csv_format.reader(text.splitlines(), delimiter=delimiter) if any(map(str.strip, row))]
    except csv_format.Error as error:
        raise InputError(f"{table}: not a table ({error}); is a quotation mark left open?") from error
    if not rows:
        raise InputError(f"{table}: the table is empty")

    header = [cell.strip() for cell in rows[0]]
    if _name(header[0]) in files_of or any(isinstance(_value(cell), float) for cell in header[1:]):
        targets = ["target"] if len(header) == 2 else [f"target_{i}" for i in range(1, len(header))]
        header = ["id", *targets]
    else:
        rows = rows[1:]
    if not rows:
        raise InputError(f"{table}: the table has a header but no rows")
    if len(set(header)) < len(header) or "" in header:
        raise InputError(f"{table}: every column needs a name of its own, not {', '.join(map(repr, header))}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise InputError(f"{table}: row {number} has {len(row)} cells for {len(header)} columns: {_first(row)}")
    return header, rows


def _id_columns(columns: list[str]) -> list[int]:
    named = [i for i, column in enumerate(columns) if column.lower() in {"id", "name", "file", "filename"}]
    return [*named, 0]


def _is_id(column: str) -> bool:
    return column.lower() == "id" or column.lower().endswith("_id")


def _name(cell: str) -> str:
    return Path(cell.strip()).name


def _value(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell.strip()


def _first(items: Sequence[str], n: int = 3) -> str:
    return ", ".join(items[:n]) + (", ..." if len(items) > n else "")
