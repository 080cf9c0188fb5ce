"""Teachers: any ASE calculator, or a model, gives structures their labels before a model learns them."""

from __future__ import annotations

import hashlib
import importlib
import json
import operator
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ase
import numpy as np
import safetensors.torch
from ase.calculators.calculator import PropertyNotImplementedError

from . import distributed
from .calculator import Calculator
from .console import console, track
from .data.labels import KEYS, Label, resolve
from .data.read import Source, read
from .data.sequences import Lazy, Subset
from .errors import InputError
from .model import SHIPPED, Model, load
from .objectives import Objective
from .run import claim, fingerprint

FILE = "teacher.jsonl"  # in the run folder: labels as they come, one structure a line
TRIED = 8  # structures that are labelled in a dry run

ASK: dict[str, Callable[[ase.Atoms], Any]] = {  # constraints are for who moves the atoms
    "forces": lambda atoms: atoms.get_forces(apply_constraint=False),
    "stress": lambda atoms: atoms.get_stress(apply_constraint=False),
    "energy": lambda atoms: atoms.get_potential_energy(apply_constraint=False),
}


class Teacher(NamedTuple):
    """Who gives the labels: a name for people, all that tells it from another, and the calculator."""

    name: str
    identity: dict[str, Any]
    calculator: Any


class Lesson(NamedTuple):
    """What a run learns from a teacher: structures and validation structures with its labels, and how they came."""

    structures: Any
    valid: Any
    asked: dict[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        """The arguments with which a run learns the same, without asking the teacher again."""
        return {"structures": self.structures, "valid": self.valid, "teacher": self}


def taught(
    teacher: Any,
    structures: Source | Mapping[str, Source],
    valid: Source | Mapping[str, Source] | None,
    objective: Objective,
    *,
    out: str | Path | None = None,
    named: Sequence[str] = (),
    skip: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    verbose: bool = True,
) -> Lesson:
    """Structures of a run with the energies, forces and stress of a teacher, as far as the objective wants them.

    Labels are appended to a file in `out` as they come, each with the fingerprint of its structure, so that the same
    call goes on where a killed one stopped. Processes that work together share the structures.

    Args:
        teacher: an ASE calculator, a function that makes one, "module:function" (or a class; the module is also looked
            for in the current folder), a model of this package or its file; None leaves everything as it is.
        named: labels whose keys or units the user has named.
        skip: leave out the structures on which the teacher fails.
        overwrite: replace labels that the structures have.
        dry_run: label only a few structures, tell how long all would take, and write nothing.

    Raises:
        InputError: for a teacher that cannot be used, labels that would be replaced, a folder that holds those of
            another teacher, and a structure on which the teacher fails.
    """
    if isinstance(teacher, Lesson):
        return teacher
    if teacher is None:
        if skip or overwrite:
            raise InputError("teacher_skip and teacher_overwrite say what a teacher may do: name the teacher too")
        return Lesson(structures, valid, {})
    if isinstance(structures, Mapping) or isinstance(valid, Mapping):
        raise InputError("a teacher labels one set of structures, not those of several parts: label them one by one")
    wanted = [name for name in ASK if name in objective.labels()]
    if not wanted:
        others = ", ".join(objective.labels()) or "without labels"
        raise InputError(f"a teacher gives energy, forces and stress, but this objective learns {others}: leave it out")
    if twice := [name for name in named if name in wanted]:
        raise InputError(f"a key or unit is named for '{twice[0]}', which the teacher gives: leave one of them out")

    chosen = teacher_of(teacher)
    quantities = _offered(chosen, wanted, objective)
    sets = [read(structures), *([] if valid is None else [read(valid)])]
    if not overwrite:
        _refuse(
            distributed.from_first(lambda: [e for some in sets for e in resolve(some, [], optional=wanted).entries])
        )
    identity = {**chosen.identity, "quantities": quantities}
    book = distributed.from_first(lambda: _opened(None if out is None else Path(out), identity, dry_run))
    keys = [[fingerprint([atoms]) for atoms in some] for some in sets]
    _fill(book, chosen, sets, keys, quantities, skip, dry_run, verbose)

    learned: list[Sequence[ase.Atoms]] = []
    left: list[list[int]] = []
    for some, own in zip(sets, keys, strict=True):
        failed = [i for i, key in enumerate(own) if "failed" in book.known.get(key, {})]
        kept = np.setdiff1d(np.arange(len(some)), failed)
        labelled = Taught(some, own, book.known, wanted, chosen.name)
        learned.append([labelled[int(i)] for i in kept] if isinstance(some, list) else Subset(labelled, kept))
        left.append(failed)
    if verbose and any(left):
        for index in left[0][:5]:
            console.print(f"[yellow]{_failure(chosen, sets[0], index, book.known[keys[0][index]])}[/yellow]")
        console.print(f"[yellow]{sum(map(len, left))} structures are left out, on which the teacher fails[/yellow]")
    if not len(learned[0]):
        raise InputError(f"the teacher {chosen.name} fails on every structure: there is nothing to learn")
    asked = {"teacher": {**identity, "left out": left[0]}}
    return Lesson(learned[0], learned[1] if valid is not None else None, asked)


def teacher_of(given: Any) -> Teacher:
    """The teacher that is meant by a calculator, a function that makes one, "module:function", a model or its file."""
    if isinstance(given, Teacher):
        return given
    if isinstance(given, Model):
        return _model_as_teacher("a model", given)
    if isinstance(given, Path) or (isinstance(given, str) and (given in SHIPPED or Path(given).exists())):
        return _model_as_teacher(str(given), load(given))
    name = given if isinstance(given, str) else f"{_owner(given).__module__}:{_owner(given).__qualname__}"
    made = _imported(given) if isinstance(given, str) else given
    if isinstance(made, type) or not _calculates(made):
        if not callable(made):
            raise InputError(f"the teacher {name} is neither an ASE calculator nor a function that makes one")
        try:
            made = made()
        except Exception as error:
            raise InputError(f"the teacher {name} cannot be made: {_sentence(error)}") from error
    if not _calculates(made):
        raise InputError(f"the teacher {name} makes {type(made).__name__}, which is no ASE calculator")
    parameters = json.dumps(dict(getattr(made, "parameters", None) or {}), sort_keys=True, default=_told)
    return Teacher(name, {"name": name, "parameters": parameters}, made)


class Taught(Lazy):
    """Structures with the labels of a teacher in place of their own, made on access; `info["level"]` says whose."""

    def __init__(
        self,
        structures: Sequence[ase.Atoms],
        keys: Sequence[str],
        known: Mapping[str, Mapping[str, Any]],
        wanted: Sequence[str],
        name: str,
    ):
        self.structures = structures
        self.keys = keys
        self.known = known
        self.wanted = wanted
        self.name = name

    def __len__(self) -> int:
        return len(self.structures)

    def at(self, index: int) -> ase.Atoms:
        atoms = self.structures[index].copy()  # without its calculator
        for quantity in self.wanted:
            for key in KEYS[quantity]:
                atoms.info.pop(key, None)
                atoms.arrays.pop(key, None)
        for quantity, value in self.known.get(self.keys[index], {}).items():
            store = atoms.arrays if quantity == "forces" else atoms.info
            store[quantity] = np.asarray(value) if quantity != "energy" else value
        atoms.info["level"] = f"teacher: {self.name}"
        return atoms


# ------------------------------------------------------------------------------------------------------- labelling


class Book:
    """Labels by the fingerprint of their structure, in a file that only grows."""

    def __init__(self, known: dict[str, dict[str, Any]], path: Path | None = None, closed: str = ""):
        self.known = known
        self.path = path  # None is in memory alone
        self.closed = closed  # why nothing can be added

    def __enter__(self) -> Book:
        writes = self.path is not None and distributed.rank() == 0
        self.file: BinaryIO | None = self.path.open("ab") if self.path is not None and writes else None
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()

    def keep(self, key: str, found: dict[str, Any]) -> None:
        self.known[key] = found
        if self.file is not None:
            self.file.write(_line({"structure": key, **found}))
            self.file.flush()


def _opened(out: Path | None, identity: Mapping[str, Any], dry_run: bool) -> Book:
    """What a run folder holds; the line that a killed process did not finish is cut off."""
    if out is None:
        return Book({})
    begun = any((out / name).exists() for name in ("state.safetensors", "model.safetensors"))
    if not begun:
        claim(out, {"teacher": identity}, read_only=dry_run)
    lines, size = _lines(out / FILE)
    if lines and lines[0] != identity:
        raise InputError(
            f"{out / FILE} holds labels of another teacher ({lines[0].get('name')}, or other settings or quantities): "
            "choose another folder, or delete that file"
        )
    known = {line.pop("structure"): line for line in lines[1:]}
    if dry_run:
        return Book(known)
    if begun:
        return Book(known, closed=f"{out} holds a run on other structures: choose another folder")
    with (out / FILE).open("ab") as file:
        file.truncate(size)
        if not lines:
            file.write(_line(identity))
    return Book(known, out / FILE)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines of a file as far as they are whole, and how many bytes these are."""
    found: list[dict[str, Any]] = []
    size = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                try:
                    content = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    break
                if not isinstance(content, dict):
                    break
                found.append(content)
                size += len(line)
    return found, size


def _fill(
    book: Book,
    teacher: Teacher,
    sets: Sequence[Sequence[ase.Atoms]],
    keys: Sequence[Sequence[str]],
    quantities: Sequence[str],
    skip: bool,
    dry_run: bool,
    verbose: bool,
) -> None:
    """Label what is not in the book, a structure at a time in each process."""
    places: dict[str, tuple[int, int]] = {}
    for number, own in enumerate(keys):
        for index, key in enumerate(own):
            places.setdefault(key, (number, index))
    usable = {key for key, found in book.known.items() if skip or "failed" not in found}
    todo = [(key, *place) for key, place in places.items() if key not in usable]
    kept = len(places) - len(todo)
    if todo and book.closed:
        raise InputError(book.closed)
    left = len(todo)
    if dry_run and left > TRIED:
        todo = [todo[i] for i in np.unique(np.linspace(0, left - 1, TRIED).astype(int))]

    start = time.perf_counter()
    n = distributed.size()
    groups = [todo[i : i + n] for i in range(0, len(todo), n)]
    with book:
        for group in track(groups, f"asking {teacher.name}", quiet=not verbose):
            mine = [
                (key, number, index, _answer(teacher.calculator, sets[number][index], quantities))
                for key, number, index in distributed.own(group)
            ]
            for key, number, index, found in chain(*distributed.gathered(mine)):
                if "failed" in found and not skip:
                    hint = "correct it, leave it out, or skip what fails with teacher_skip (--teacher-skip)"
                    raise InputError(f"{_failure(teacher, sets[number], index, found)}: {hint}")
                book.keep(key, found)
    if verbose:
        gave = f"Teacher {teacher.name}: {', '.join(sorted(quantities))} of {len(places)} structures"
        console.print(f"{gave}{f', {kept} of them from before' if kept else ''}", markup=False)
        if dry_run and todo:
            each = (time.perf_counter() - start) / len(todo)
            minutes = each * left / 60
            console.print(f"The teacher takes {each:.2g} s a structure: {minutes:.2g} min for the {left} that are left")


def _answer(calculator: Any, structure: ase.Atoms, quantities: Sequence[str]) -> dict[str, Any]:
    """What the calculator says of a structure, or why it says nothing ("failed")."""
    atoms = structure.copy()
    atoms.calc = calculator
    shapes = {"energy": (), "forces": (len(atoms), 3), "stress": (6,)}
    found: dict[str, Any] = {}
    for name in quantities:
        if name == "stress" and not (atoms.pbc.all() and atoms.cell.rank == 3):
            continue  # it is per volume, and there is none
        try:
            value = np.asarray(ASK[name](atoms), float)
        except PropertyNotImplementedError:
            continue
        except Exception as error:  # calculators raise anything
            return {"failed": _sentence(error)}
        if value.size != np.prod(shapes[name]) or not np.isfinite(value).all():
            shape = value.size == np.prod(shapes[name])
            return {"failed": f"of its {name} {'a number is not finite' if shape else f'the shape is {value.shape}'}"}
        found[name] = value.reshape(shapes[name]).tolist()
    return found or {"failed": "it gives no energy, forces or stress"}


def _failure(teacher: Teacher, structures: Sequence[ase.Atoms], index: int, found: Mapping[str, Any]) -> str:
    formula = structures[index].get_chemical_formula()
    return f"the teacher {teacher.name} fails on structure {index} ({formula}): {found['failed']}"


# ---------------------------------------------------------------------------------------------------------- asking


def _offered(teacher: Teacher, wanted: Sequence[str], objective: Objective) -> list[str]:
    """The quantities that are wanted and that the calculator has."""
    has = list(getattr(teacher.calculator, "implemented_properties", None) or ASK)
    lacking = [name for name in wanted if name not in has]
    if needed := [name for name in lacking if objective.labels()[name]]:
        raise InputError(
            f"the teacher {teacher.name} has no {needed[0]}, which the objective learns: it has {_and(has)}"
        )
    if len(lacking) == len(wanted):
        raise InputError(f"the teacher {teacher.name} has none of {_and(wanted)}: it has {_and(has)}")
    return [name for name in wanted if name in has]


def _refuse(labels: Sequence[Label]) -> None:
    """Refuse to replace labels that are there."""
    for entry in labels:
        raise InputError(
            f"{entry.count} of {entry.total} structures have '{entry.quantity}' already, as {entry.keys[0][1]}: train "
            "without the teacher, or let it replace labels with teacher_overwrite (--teacher-overwrite)"
        )


def _model_as_teacher(name: str, model: Model) -> Teacher:
    weights = hashlib.sha256(safetensors.torch.save(dict(model.state_dict()))).hexdigest()[:16]
    return Teacher(name, {"name": name, "weights": weights}, Calculator(model))


def _imported(name: str) -> Any:
    """What "module:name" names; the module may lie in the current folder."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InputError(f"the teacher '{name}' is no file of a model, and not module:function: give one of them")
    here = os.getcwd()
    if here not in sys.path:  # as `python` does; it stays, because a module may import others when it is called
        sys.path.insert(0, here)
    try:
        return operator.attrgetter(attribute)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        missing = str(error.name)
        where = "is neither installed nor in this folder"
        of = "" if f"{module}.".startswith(f"{missing}.") else f", which {module} imports,"
        raise InputError(f"the teacher {name}: the module {missing}{of} {where}") from None
    except AttributeError:
        raise InputError(f"the teacher {name}: the module {module} has no {attribute}") from None
    except Exception as error:
        raise InputError(f"the teacher {name}: importing {module} fails: {_sentence(error)}") from error


def _owner(thing: Any) -> Any:
    """What has the name of a calculator or of a function: the class of one, the other itself."""
    return thing if hasattr(thing, "__qualname__") else type(thing)


def _calculates(thing: Any) -> bool:
    return not isinstance(thing, type) and hasattr(thing, "get_potential_energy") and hasattr(thing, "get_forces")


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def _told(thing: Any) -> Any:
    """A parameter of a calculator as JSON: arrays by their numbers, other objects by their class."""
    return thing.tolist() if isinstance(thing, np.ndarray | np.generic) else type(thing).__qualname__


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text[:200]}' if text else ''}"


def _and(names: Sequence[str]) -> str:
    return ", ".join(names)
