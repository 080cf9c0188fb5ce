"""A study is many cells: pieces of work that are each done once, wherever there is room, and kept."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..backbones import Backbone
from ..console import bar
from ..errors import InputError
from ..model import asked, described, held, write_whole
from ..objectives import Objective
from ..run import write_json

LOCK = "lock"  # a file of each cell, held by who works on it
RESULT = "result.json"  # another one, of a finished cell
PAUSE = 5.0  # seconds before asking again for a cell that another command is working on
LOOK = 0.5  # seconds between looks at what is running
PATIENCE = 15.0  # seconds until a scheduler has answered

ONE_AT_A_TIME = threading.Lock()  # threads of one process share torch's random numbers


class Failed(InputError):
    """Some cells of a study failed; all others that could be done are."""


class Done(NamedTuple):
    """A finished cell, as the cells that need it are given it."""

    folder: Path
    result: Any


@dataclass(frozen=True, eq=False)
class Cell:
    """One piece of a study: `work(folder, **key, **arguments, **needs)`, whose result is kept as JSON.

    The folder is the cell's own, and the same one when it begins again after it was killed: with `out=folder / "run"`,
    `pretrain` and `finetune` go on where they were. Cells with another key, other arguments, another `work` or version,
    or that need other cells, are other cells; code that changes behind them goes unnoticed, and so does a file. What is
    new in a class and at its default makes no other cell, and a default that has changed is an error.

    Args:
        key: what tells the cell from others in a table, such as {"arm": "scratch", "labels": 100, "seed": 0}.
        work: a function at the top of a module, so that other processes find it.
        arguments: JSON values, paths, objectives and backbones; of data its fingerprint too, if it may change.
        needs: cells that come first, by the name under which `work` is given each as `Done`.
        steps: optimiser steps that it takes, for the progress bar alone.
        version: to be raised when `work` comes to mean something else.
    """

    key: Mapping[str, Any]
    work: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Cell] = field(default_factory=dict)
    steps: int = 1
    version: int = 1

    @cached_property
    def title(self) -> str:
        """What it is called on the screen: the function and the values of the key."""
        return cut("-".join([self.work.__name__.strip("_"), *map(str, self.key.values())]), 80)

    @cached_property
    def name(self) -> str:
        """What it is called on disk: the title and a hash of all that makes it another cell."""
        text = json.dumps(self.identity, sort_keys=True)
        return f"{self.title}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that makes it another cell, as JSON; of objectives and backbones what is not at its default."""
        work = getattr(self.work, "__qualname__", "<nothing>")
        if "<" in work:
            raise InputError(f"{self.work!r} cannot be the work of a cell: give a function at the top of a module")
        names = [*self.key, *self.arguments, *self.needs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"'{twice[0]}' is given twice to the cell {self.title}: choose another name")
        try:
            inspect.signature(self.work).bind("folder", **dict.fromkeys(names))
        except TypeError as error:
            raise InputError(f"the cell {self.title} does not fit its function: {error}") from None
        found = {
            "work": work,
            "version": self.version,
            "key": self.key,
            "arguments": self.arguments,
            "needs": {name: cell.name for name, cell in self.needs.items()},
        }
        try:
            return _as_json(found)
        except TypeError as error:
            raise InputError(f"the cell {self.title} cannot be told from others: {error}") from None

    @property
    def in_full(self) -> Any:
        """All that objectives and backbones were built with, by which a default that has changed is noticed."""
        return _as_json([self.arguments, self.key], described)

    def folder(self, out: str | Path) -> Path:
        """Where a study in the folder `out` keeps it."""
        return Path(out).resolve() / "cells" / self.name

    def is_done(self, out: str | Path) -> bool:
        """Whether a study in the folder `out` has its result."""
        return (self.folder(out) / RESULT).exists()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def cut(words: str, most: int) -> str:
    """Words as part of a file's name: without what has a meaning in paths, in so many bytes at most."""
    return re.sub(r"[^\w.+-]+", "_", words).encode()[:most].decode(errors="ignore")


def run(
    cells: Iterable[Cell],
    out: str | Path,
    *,
    executor: Executor | str | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> Iterator[tuple[Cell, Any]]:
    """Do all cells and those they need; yields each with its result, finished ones first, others as they finish.

    Cells begin in the order given. A finished one is never done again; a stopped study goes on with the same call. A
    cell that fails leaves its traceback in error.txt and the others go on. Several calls on the same folder share the
    work: a cell that another one is working on is left to it.

    Args:
        out: folder of the study; with workers on other machines, on a file system that they share.
        executor: where cells are done: processes of this machine with one thread each, the address of a Dask
            scheduler, or any executor; in one process they take turns.
        workers: cells at once; by default as many as there are cores here, or as an executor takes.

    Raises:
        Failed: at the end, if cells failed.
        InputError: for cells that cannot be told apart, an executor that cannot be reached, workers that do not see
            the folder or that died.
    """
    every = _with_needed(cells)
    done = {cell: found["result"] for cell in every if (found := _kept(cell.folder(out), cell)) is not None}
    left = [cell for cell in every if cell not in done]
    yield from list(done.items())
    if not left:
        return

    failed: dict[Cell, str] = {}
    resting: dict[Cell, float] = {}  # cells of another command, and when to ask for them again
    running: dict[Future[tuple[str, Any]], Cell] = {}
    with _opened(executor, workers, len(left)) as (pool, most), bar(quiet) as bars:
        task = bars.add_task(
            "study", total=sum(cell.steps for cell in every), **_progress(out, done, running, len(every))
        )
        try:
            while running or _ready(left, done):
                for cell in _ready(left, done):
                    if len(running) < most and resting.get(cell, 0.0) <= time.monotonic():
                        running[_begun(pool, cell, out, done)] = cell
                        left.remove(cell)
                for future in _next(running):
                    outcome, content = _outcome(future)
                    cell = running.pop(future)
                    if outcome == "done":
                        done[cell] = content
                        yield cell, content
                    elif outcome == "busy":
                        left.insert(0, cell)
                        resting[cell] = time.monotonic() + PAUSE
                    else:
                        failed[cell] = content
                bars.update(task, **_progress(out, done, running, len(every)))
        except BrokenExecutor:
            names = ", ".join(cell.title for cell in running.values())
            raise InputError(
                f"a process died (out of memory, or killed) while these cells were worked on: {names}; the same "
                "command goes on, with fewer workers if memory is short; a script that starts a study must do so under "
                '`if __name__ == "__main__":`'
            ) from None
        except KeyboardInterrupt as error:
            told = f"{len(done)} of {len(every)} cells are done; the same command goes on"
            raise KeyboardInterrupt(*error.args, told) from None
        finally:
            for future in running:
                future.cancel()
    if failed:
        raise Failed(_failure(failed, len(left), len(every), Path(out)))


# ------------------------------------------------------------------------------------------------------ the order


def _with_needed(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once, after those it needs, otherwise in the order given."""
    order: dict[Cell, None] = {}

    def add(cell: Cell) -> None:
        if cell not in order:
            for needed in cell.needs.values():
                add(needed)
            order[cell] = None

    for cell in cells:
        add(cell)
    return list(order)


def _ready(left: Sequence[Cell], done: Mapping[Cell, Any]) -> list[Cell]:
    return [cell for cell in left if all(needed in done for needed in cell.needs.values())]


def _next(running: Mapping[Future[tuple[str, Any]], Cell]) -> list[Future[tuple[str, Any]]]:
    """What has finished, after a short wait."""
    if not running:  # another command has all that could be done
        time.sleep(LOOK)
        return []
    finished = wait(running, timeout=LOOK, return_when=FIRST_COMPLETED).done
    return [future for future in running if future in finished]


def _failure(failed: Mapping[Cell, str], dependent: int, total: int, out: Path) -> str:
    shown = [f"{cell.title} ({reason})" for cell, reason in list(failed.items())[:3]]
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    rest = f", {dependent} more that need them did not begin" if dependent else ""
    return (
        f"{len(failed)} of {total} cells failed{rest}: {', '.join(shown)}{more}; see error.txt in their folders in "
        f"{out / 'cells'}, and start the same command again when the cause has gone"
    )


# ------------------------------------------------------------------------------------------------------- one cell


def _begun(pool: Executor, cell: Cell, out: str | Path, done: Mapping[Cell, Any]) -> Future[tuple[str, Any]]:
    """Hand a cell to a worker."""
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cell.json", {**cell.identity, "in full": cell.in_full})
    needed = {name: Done(other.folder(out), done[other]) for name, other in cell.needs.items()}
    with _deaf():
        return pool.submit(_do, folder, cell.work, {**cell.key, **cell.arguments, **needed})


def _do(folder: Path, work: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """One cell, in a worker: ("done", its result), ("failed", a sentence) or ("busy", None).

    What this raises is no fault of the cell.
    """
    if not (folder / "cell.json").exists():
        raise InputError(
            f"the worker on {platform.node()} does not see {folder}: choose a folder on a file system that this "
            "machine and all workers share"
        )
    with ONE_AT_A_TIME, held(folder / LOCK, make=True) as ours:
        if ours is False:
            return "busy", None
        if (found := _kept(folder)) is not None:  # another command was faster
            return "done", found["result"]
        try:
            result = _as_json(work(folder, **arguments))
        except Exception as error:
            write_whole(folder / "error.txt", traceback.format_exc().encode())
            return "failed", _sentence(error)
        write_json(folder / RESULT, {**json.loads((folder / "cell.json").read_text()), "result": result})
        (folder / "error.txt").unlink(missing_ok=True)
        return "done", result


def _outcome(future: Future[tuple[str, Any]]) -> tuple[str, Any]:
    try:
        return future.result()
    except (InputError, BrokenExecutor):
        raise
    except Exception as error:  # it never began, or its worker was lost
        return "failed", _sentence(error)


def _kept(folder: Path, cell: Cell | None = None) -> dict[str, Any] | None:
    """What a finished cell left in its folder; an error where a default has changed since."""
    file = folder / RESULT
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError(f"{file} is damaged: delete it, and the cell is done again") from None
    if cell is not None and "in full" in found and not _agree(found["in full"], cell.in_full):
        raise InputError(
            f"{folder} was done with other defaults than those of today: choose another folder for the study, or "
            "delete this one"
        )
    return found


def _agree(one: Any, other: Any) -> bool:
    """Whether two values are the same wherever both say something."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_agree(one[name], other[name]) for name in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_agree, one, other))
    return bool(one == other)


def _as_json(content: Any, describe: Callable[[Any], Any] | None = None) -> Any:
    """The content as it will be read again."""
    return json.loads(json.dumps(content, default=partial(_plain, describe=describe)))


def _plain(thing: Any, describe: Callable[[Any], Any] | None = None) -> Any:
    """JSON values for what cells are given and return; objectives and backbones as `describe` has them."""
    if isinstance(thing, np.generic | np.ndarray):
        return thing.tolist()
    if isinstance(thing, Path):
        return str(thing)
    if isinstance(thing, Objective | Backbone):  # by default such that a new argument at its default changes nothing
        return describe(thing) if describe else {"class": type(thing).__name__, "arguments": asked(thing)}
    if isinstance(thing, Mapping):
        return dict(thing)
    raise TypeError(f"{type(thing).__name__} is not a JSON value, path, objective or backbone")


def _sentence(error: Exception) -> str:
    """What the error says, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}".removesuffix(": ")


# -------------------------------------------------------------------------------------------------------- workers


@contextmanager
def _opened(executor: Executor | str | None, workers: int | None, cells: int) -> Iterator[tuple[Executor, float]]:
    """An executor, and how many cells to hand it at once."""
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, but must be at least one")
    if executor is None:
        most = min(workers or cores(), cells)
        with _processes(most) as pool:
            yield pool, most
    elif isinstance(executor, str):
        with _dask(executor) as pool:
            yield pool, workers or math.inf
    else:
        yield executor, workers or math.inf


@contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    """Processes of this machine with one thread each, which end with whoever started them, however that ends."""
    context = multiprocessing.get_context("spawn")  # forked processes would inherit busy threads
    leash, end = context.Pipe(duplex=False)
    with (
        _environment("OMP_NUM_THREADS", "1"),
        ProcessPoolExecutor(workers, mp_context=context, initializer=_prepared, initargs=(leash,)) as pool,
    ):
        try:
            yield pool
        except BaseException:
            end.close()  # what is running ends too: it goes on from what it saved
            raise


@contextmanager
def _deaf() -> Iterator[None]:
    """Put Ctrl-C off; processes that begin within never hear it, from their first import on."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepared(leash: Connection) -> None:
    """Make this process a worker: one thread, deaf to Ctrl-C, and gone when the other end of the leash is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def hold() -> None:
        try:
            leash.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=hold, daemon=True).start()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable of the environment, for processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _dask(address: str) -> Iterator[Executor]:
    """The workers of a Dask scheduler."""
    if "://" not in address:
        raise InputError(f"'{address}' is not the address of a Dask scheduler, such as tcp://node1:8786")
    try:
        dask = importlib.import_module("distributed")
    except ImportError:
        raise InputError(f"{address} needs Dask: pip install 'transfermium[dask]'") from None
    try:
        client = dask.Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError):
        raise InputError(f"no Dask scheduler answers at {address}: start one with `dask scheduler`") from None
    with client:
        yield client.get_executor(pure=False)


def cores() -> int:
    """Those that this process may use, which a batch system may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------- progress


def _progress(
    out: str | Path, done: Mapping[Cell, Any], running: Mapping[Future[tuple[str, Any]], Cell], total: int
) -> dict[str, Any]:
    """Steps done, those in running cells too (never all: errors are measured after the last), and what is running."""
    inside = {cell: _steps_in(cell.folder(out)) for cell in running.values()}
    steps = sum(cell.steps for cell in done) + sum(min(0.95 * cell.steps, n) for cell, n in inside.items())
    names = [cell.title for cell, n in inside.items() if n] or [cell.title for cell in inside]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return {"completed": steps, "note": f"{len(done)} of {total} cells · {', '.join(names[:1])}{more}"}


def _steps_in(folder: Path) -> int:
    """Optimiser steps that all runs in the folder have done."""
    return sum(_last_step(file) for file in folder.rglob("metrics.jsonl"))


def _last_step(file: Path) -> int:
    """The step of the last whole line, read from the end."""
    with open(file, "rb") as metrics:
        metrics.seek(max(0, metrics.seek(0, os.SEEK_END) - 4096))
        lines = metrics.read().rpartition(b"\n")[0].split(b"\n")
    try:
        return int(json.loads(lines[-1])["step"])
    except (ValueError, KeyError):
        return 0
