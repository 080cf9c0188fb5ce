"""A run folder: what was asked for, so that the same command goes on and another one is refused."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ase
import numpy as np

from .errors import InputError
from .model import UNFINISHED, held, sweep, write_whole

WITHOUT_EFFECT = ("device", "workers", "accumulate")  # options that change where a run happens, not what it finds
STATISTICS = ("rms", "minimum", "maximum")  # of labels, rounded otherwise where they are read as columns
UNWRITTEN = {"batches per step": 1, "flop": None}  # what runs of earlier versions were, where they say nothing
OURS = ("verb", "teacher")  # one of which every configuration has
FIRST = {"config.json", "labels.json", "split.json", "metrics.csv", "metrics.jsonl"}  # before anything was learned
HINTS = {"batches per step": "choose --accumulate times the number of processes to keep it"}

P = ParamSpec("P")
T = TypeVar("T")


def leaving_nothing(verb: Callable[P, T]) -> Callable[P, T]:
    """The same function of `out`: what it holds (`hold`) is free when it ends, however it does.

    What it began in a new folder is gone when its input turns out to be of no use.
    """

    @functools.wraps(verb)
    def careful(*args: P.args, **kwargs: P.kwargs) -> T:
        given = inspect.signature(verb).bind_partial(*args, **kwargs).arguments.get("out")
        out = None if given is None else Path(given)
        new = out is not None and not out.exists()
        try:
            with _holding():
                return verb(*args, **kwargs)
        except InputError:
            with contextlib.suppress(OSError):  # of several processes each comes here
                if out is not None and new and {file.name for file in out.iterdir()} <= FIRST:
                    for file in out.iterdir():
                        file.unlink()
                    out.rmdir()
            raise

    return careful


def hold(path: Path) -> None:
    """Keep others from working in a folder or at a file until the verb that is at work here ends.

    Raises `InputError` where another process does so already, as far as there are locks.
    """
    _hold.get()(path)


def claim(out: str | Path | None, config: Mapping[str, Any], read_only: bool = False) -> Path | None:
    """Make `out` the folder of this configuration, or raise `InputError` if it belongs to another one.

    A run that has saved nothing yet, because its command failed, owns no folder. One that is not finished is held (see
    `hold`). With `read_only` it is only asked whether the folder could be had, and nothing is written.
    """
    if out is None:
        return None
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose a folder for the run")
    config = json.loads(json.dumps(config))
    begun = _begun(out, config)
    if read_only:
        return out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model.safetensors").exists():
        hold(out)
        begun = _begun(out, config)  # who held it before may have begun since
    sweep(out)  # what a process that was killed left of files that it was writing
    if not begun:
        write_json(out / "config.json", config)
    return out


def _begun(out: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder has something of this run; raises `InputError` where it has something else."""
    file = out / "config.json"
    begun = any((out / name).exists() for name in ("state.safetensors", "model.safetensors"))
    found = None
    if file.exists():
        try:
            found = json.loads(file.read_text())
        except ValueError:
            if begun:
                raise InputError(f"{file} is damaged: delete the folder or choose another one") from None
    ours = isinstance(found, dict) and not found.keys().isdisjoint(OURS)
    if ours and begun:
        changed = [(name, old, new) for name, old, new in _differences(found, config) if old != new]
        if changed:
            name, old, new = changed[0]
            hint = HINTS.get(name.rpartition(".")[2])
            raise InputError(
                f"{out} holds another run: {name} was {_short(old)} there and is {_short(new)} now"
                f"{f' (and {len(changed) - 1} more differ)' if len(changed) > 1 else ''}; "
                f"{f'{hint}, or ' if hint else ''}choose another folder"
            )
    elif not ours and out.exists() and not all(path.name.endswith(UNFINISHED) for path in out.iterdir()):
        raise InputError(f"{out} exists and is not a run of transfermium: choose another folder")
    return ours and begun


@contextlib.contextmanager
def _holding() -> Iterator[None]:
    """What is held within is free afterwards."""
    with contextlib.ExitStack() as locks:
        token = _hold.set(functools.cache(lambda path: locks.enter_context(_alone(path))))
        try:
            yield
        finally:
            _hold.reset(token)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a hidden file in a folder or beside a file; the system drops the lock with the process, however that ends.

    The file of a killed process looks like any that is unfinished, and goes with the next command.
    """
    name = f".run.lock{UNFINISHED}" if path.is_dir() else f".{path.name}.lock{UNFINISHED}"
    lock = (path if path.is_dir() else path.parent) / name
    with held(lock, make=True) as ours:
        if ours is False:
            raise InputError(f"another process is at work in {path}: wait until it ends, or choose another place")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


_hold: ContextVar[Callable[[Path], None]] = ContextVar("hold", default=lambda path: None)  # of the verb at work


def write_json(path: Path, content: Any) -> None:
    """Write JSON at once or not at all."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def plain(content: Any) -> Any:
    """The same in types that JSON knows; None for numbers that are not finite, which it does not."""
    if isinstance(content, Mapping):
        return {str(name): plain(item) for name, item in content.items()}
    if isinstance(content, np.ndarray | np.generic):
        return plain(content.tolist())
    if isinstance(content, list | tuple):
        return [plain(item) for item in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content if content is None or isinstance(content, bool | int | str) else str(content)


def fingerprint(structures: Sequence[ase.Atoms], most: int = 20_000) -> str:
    """A short hash of geometries and labels; of evenly spaced structures where there are more than `most`."""
    digest = hashlib.sha256(str(len(structures)).encode())
    for index in np.unique(np.linspace(0, len(structures) - 1, min(len(structures), most)).astype(int)):
        atoms = structures[int(index)]
        for array in (atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc):
            digest.update(np.ascontiguousarray(array).tobytes())
        results = atoms.calc.results if atoms.calc is not None else {}
        named = {**atoms.arrays, **atoms.info, **{f"calc {name}": value for name, value in results.items()}}
        for name in sorted(named):
            try:
                value = np.asarray(named[name]).tolist()
            except ValueError:  # lists of several lengths
                value = named[name]
            digest.update(f"{name}={value}".encode())
    return digest.hexdigest()[:16]


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two nested mappings and lists side by side, but for what may differ in the same run."""
    if isinstance(old, dict) and isinstance(new, dict):
        ignored = WITHOUT_EFFECT + (STATISTICS if name.startswith("labels") else ())
        for key in dict.fromkeys([*old, *new]):
            if key not in ignored:
                before, now = (found.get(key, UNWRITTEN.get(key)) for found in (old, new))
                yield from _differences(before, now, f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, now, f"{name}[{index}]")
    else:
        yield name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."
