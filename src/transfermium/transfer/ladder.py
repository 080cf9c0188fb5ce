"""The ladder of strategies: each rung changes more of the base, and the last that makes validation better is taken."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import distributed
from ..console import console, table
from ..errors import InputError
from ..evaluate import PRINTED
from ..model import Model, write_whole
from ..objectives import Objective
from ..run import write_json
from .calibrate import judge_choice
from .probe import probes

RUNGS = {
    "zero-shot": "nothing",
    "aligned": "references",
    "probe": "a fit to frozen features",
    "head": "heads",
    "lora": "heads and low-rank updates",
    "full": "everything",
}
LEAST = 10  # structures, of training and validation together: fewer cannot choose
FAILURES = {
    "not finite": "nothing: training diverged",
    "nothing to probe": "nothing: all features are alike",
    "a probe needs at least three": "nothing: too few labels",
    "no linear layer": "nothing: no layer to update",
}
OWN = ("config.json", "model.safetensors", "state.safetensors", "rung.json", "report.html", "report.json")


class Rung(NamedTuple):
    """What one strategy found."""

    name: str
    trained: str
    errors: dict[str, dict[str, Any]]  # of each quantity, on validation structures
    seconds: float
    failed: str = ""  # why there is no model

    @property
    def error(self) -> float:
        """Geometric mean over quantities, which have no unit in common, of mean absolute errors (or cross entropies).

        Infinite where there are none.
        """
        found = [max(_judged(each), 1e-300) for each in self.errors.values()]
        return math.exp(sum(map(math.log, found)) / len(found)) if found else math.inf


def rungs(objective: Objective, align: bool, frozen: bool) -> list[str]:
    """The strategies that can be tried: a probe where it can learn this, and nothing that trains a frozen backbone."""
    possible = {"aligned": align, "probe": probes(objective), "lora": not frozen, "full": not frozen}
    return [name for name in RUNGS if possible.get(name, True)]


def climbed(
    run: Callable[[str, Path | None], Model],
    names: Sequence[str],
    n: int,
    n_valid: int,
    folder: Path | None,
    dry_run: bool,
    verbose: bool,
) -> Model:
    """Run all rungs, each in a folder of its own, and return the model that is best on validation structures.

    A rung is taken over those before it only if its error (`Rung.error`) is lower. The last stage in the card of the
    model has the table of all rungs, under "ladder".

    Args:
        run: trains by a strategy, in a folder; all must have the same validation structures.
        names: strategies, those that change least first.
        n, n_valid: structures of all, and of validation.
        folder: of the ladder; a rung that is finished there is not run again.
        dry_run: only rehearse the last rung, which takes longest.

    Raises:
        InputError: where there are too few structures to choose by.
    """
    if not n_valid:
        raise InputError(
            "strategy 'auto' chooses by validation structures, but there are none: give some, or a strategy"
        )
    if n < LEAST:
        raise InputError(
            f"strategy 'auto' needs {LEAST} structures to choose by, but there are {n}: choose 'aligned' or 'probe'"
        )
    if dry_run:
        if verbose:
            console.print(f"The last of {len(names)} rungs ({', '.join(names)}); others take as long at most:")
        return run(names[-1], None if folder is None else folder / "rungs" / names[-1])
    best: Model | None = None
    found: list[Rung] = []
    reached: list[Model] = []
    for number, name in enumerate(names, 1):
        if verbose:
            console.print(f"[bold]Rung {number} of {len(names)}: {name}[/bold]")
        model, rung = _reached(run, name, None if folder is None else folder / "rungs" / name)
        reached += [] if model is None else [model]
        if model is not None and rung.error < min((each.error for each in found), default=math.inf):
            best = model
        found.append(rung)
    taken = min(found, key=lambda rung: rung.error)  # of equals the first
    if best is None:
        raise InputError("no rung predicts a finite number for a validation structure: look at the labels and the base")
    ladder = {"taken": taken.name, "rungs": [rung._asdict() for rung in found]}
    best.card["history"][-1]["ladder"] = ladder
    judge_choice(best, reached)
    if verbose:
        console.print(table("", printable_ladder(ladder)))
        console.print(f"Taken: {taken.name}, the best of {len(found)} rungs on {n_valid} validation structures")
    if folder is not None and distributed.rank() == 0:
        for path in (folder / "rungs" / taken.name).iterdir():
            if path.is_file() and path.name not in OWN:
                write_whole(folder / path.name, path.read_bytes())
        best.save(folder / "model.safetensors")
    return best


def printable_ladder(ladder: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table for people: errors of each rung, mean absolute ones or of classes cross entropies."""
    quantities = {name: each for rung in ladder["rungs"] for name, each in rung["errors"].items()}
    rows = []
    for rung in ladder["rungs"]:
        row = {"rung": f"{rung['name']} ←" if rung["name"] == ladder["taken"] else rung["name"]}
        row["trained"] = rung["failed"] or rung["trained"]
        for name, each in quantities.items():
            unit, factor = PRINTED.get(each["unit"], (each["unit"], 1.0))
            title = f"{name.replace('_', ' ')} ({unit})" if unit else name.replace("_", " ")
            row[title] = f"{_judged(rung['errors'][name]) * factor:.4g}" if name in rung["errors"] else ""
        rows.append({**row, "seconds": f"{rung['seconds']:.3g}"})
    return rows


def _reached(run: Callable[[str, Path | None], Model], name: str, folder: Path | None) -> tuple[Model | None, Rung]:
    """The model of a rung, unless what it found makes it fail, and what is told of it."""
    start = time.monotonic()
    try:
        model = run(name, folder)
    except InputError as error:
        reason = next((text for words, text in FAILURES.items() if words in str(error)), None)
        if reason is None:
            raise
        return None, Rung(name, RUNGS[name], {}, time.monotonic() - start, reason)
    stage = model.card["history"][-1]
    trained = stage["alignment"].get("probe", RUNGS[name])
    errors = model.card["metrics"].get("validation", {})
    seconds = distributed.from_first(lambda: _seconds(folder, max(time.monotonic() - start, stage["seconds"])))
    return model, Rung(name, trained, errors, seconds)


def _seconds(folder: Path | None, seconds: float) -> float:
    """What a rung took when it was run, which is kept in its folder."""
    if folder is None:
        return round(seconds, 2)
    kept = folder / "rung.json"
    if not kept.exists():
        write_json(kept, {"seconds": round(seconds, 2)})
    return float(json.loads(kept.read_text())["seconds"])


def _judged(found: Mapping[str, Any]) -> float:
    return float(found.get("mae", found.get("cross_entropy", math.inf)))
