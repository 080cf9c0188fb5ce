"""MatBench v0.1: its tasks, its folds, and records as its leaderboard reads them (Dunn et al. 2020)."""

import difflib
import gzip
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from ase import Atoms

from ..data import read
from ..errors import InputError
from ..model import write_whole

SEED = 18012019
N_FOLDS = 5
VERSION = "0.6"  # of the matbench package whose files we write
Z_95 = 1.959963984540054  # half the width of a 95 % interval, in standard deviations


@dataclass(frozen=True)
class Task:
    """One prediction problem.

    Attributes:
        size: number of samples.
        target: name of the label in the official file.
        unit: of the label; empty for pure numbers and classes.
        has_structure: False where only compositions are given.
    """

    name: str
    size: int
    target: str
    unit: str
    kind: Literal["regression", "classification"] = "regression"
    has_structure: bool = True

    @property
    def key(self) -> str:
        """The target as a name for `Property`: `last_phdos_peak`, `log10_G_VRH`."""
        return re.sub(r"\W+", "_", self.target).strip("_")

    @property
    def ids(self) -> list[str]:
        """Official ids in the order of the data: `mb-jdft2d-001` to `mb-jdft2d-636`."""
        stem = self.name.replace("matbench", "mb").replace("_", "-")
        return [f"{stem}-{i:0{len(str(self.size))}d}" for i in range(1, self.size + 1)]


TASKS = {
    task.name: task
    for task in (
        Task("matbench_dielectric", 4764, "n", ""),
        Task("matbench_expt_gap", 4604, "gap expt", "eV", has_structure=False),
        Task("matbench_expt_is_metal", 4921, "is_metal", "", "classification", has_structure=False),
        Task("matbench_glass", 5680, "gfa", "", "classification", has_structure=False),
        Task("matbench_jdft2d", 636, "exfoliation_en", "meV/atom"),
        Task("matbench_log_gvrh", 10987, "log10(G_VRH)", "log10(GPa)"),
        Task("matbench_log_kvrh", 10987, "log10(K_VRH)", "log10(GPa)"),
        Task("matbench_mp_e_form", 132752, "e_form", "eV/atom"),
        Task("matbench_mp_gap", 106113, "gap pbe", "eV"),
        Task("matbench_mp_is_metal", 106113, "is_metal", "", "classification"),
        Task("matbench_perovskites", 18928, "e_form", "eV/cell"),
        Task("matbench_phonons", 1265, "last phdos peak", "cm^-1"),
        Task("matbench_steels", 312, "yield strength", "MPa", has_structure=False),
    )
}


def find_task(name: str | Task) -> Task:
    """The task of this name, with or without `matbench_`."""
    if isinstance(name, Task):
        return name
    full = name if name.startswith("matbench_") else f"matbench_{name}"
    if full not in TASKS:
        close = difflib.get_close_matches(full, TASKS, n=3) or TASKS
        raise InputError(f"{name!r} is no task of MatBench v0.1; did you mean {' or '.join(close)}?")
    return TASKS[full]


# ------------------------------------------------------------------------------------------------------------- folds


class Fold(NamedTuple):
    """Ascending positions in the data, counted from 0."""

    train: np.ndarray  # to train and to validate on
    test: np.ndarray


def folds(task: str | Task | int, labels: Sequence[Any] | np.ndarray | None = None) -> list[Fold]:
    """The five official folds of a task, or of a number of samples.

    Classification, and a number of samples with `labels`, is stratified: each fold has the same share of each class.
    The folds are those of scikit-learn's `KFold` and `StratifiedKFold(5, shuffle=True, random_state=18012019)`.
    """
    if isinstance(task, int):
        name, size, stratified = "the task", task, labels is not None
    else:
        found = find_task(task)
        name, size, stratified = found.name, found.size, found.kind == "classification"
    if size < N_FOLDS:
        raise InputError(f"{size} samples cannot be divided into {N_FOLDS} folds")
    if stratified and (labels is None or len(labels) != size):
        given = "none" if labels is None else len(labels)
        raise InputError(f"the folds of {name} depend on the labels of all {size} samples, in order; {given} are given")
    number = _shuffled(size) if labels is None or not stratified else _stratified(np.asarray(labels))
    return [Fold(np.flatnonzero(number != fold), np.flatnonzero(number == fold)) for fold in range(N_FOLDS)]


def _shuffled(size: int) -> np.ndarray:
    """The fold of each sample: consecutive parts of a shuffled list, the first ones longer by one."""
    order = np.random.RandomState(SEED).permutation(size)
    number = np.empty(size, int)
    number[order] = np.sort(np.arange(size) % N_FOLDS)
    return number


def _stratified(labels: np.ndarray) -> np.ndarray:
    """The fold of each sample: dealt out in turn to the samples sorted by class, then shuffled within each class.

    Classes come in the order in which they first appear, which the stream of random numbers depends on.
    """
    _, first, classes = np.unique(labels, return_index=True, return_inverse=True)
    classes = np.argsort(np.argsort(first))[classes]
    dealt = np.argsort(np.argsort(classes, kind="stable")) % N_FOLDS  # by rank in the sorted list
    rng = np.random.RandomState(SEED)
    for one in range(len(first)):
        own = np.sort(dealt[classes == one])
        rng.shuffle(own)
        dealt[classes == one] = own
    return dealt


# -------------------------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """A task with its data, in the official order."""

    task: Task
    structures: list[Atoms]
    labels: np.ndarray  # (size,): float, or bool for classification


def read_task(path: str | Path, task: str | Task | None = None) -> Data:
    """Read an official `matbench_*.json.gz`, or any source of structures that have their `mbid` in `info`.

    Without `task` the name of the file or of its folder says which it is. The label is put into `info` under
    `task.key`, classes as 0 and 1. A source that is not complete is an `InputError`: folds are positions in the whole.
    """
    path = Path(path)
    task = _task_of(path) if task is None else find_task(task)
    if not task.has_structure:
        raise InputError(f"{path}: {task.name} gives compositions without structures, which no model here can use")
    structures = [*read(path)]
    if len(structures) != task.size:
        raise InputError(
            f"{path}: {len(structures)} structures, but {task.name} has {task.size}; use the complete file"
        )

    ids = {name: place for place, name in enumerate(task.ids)}
    if not any("mbid" in atoms.info for atoms in structures):  # official files have them in the order of their ids
        for name, atoms in zip(ids, structures, strict=True):
            atoms.info["mbid"] = name
    names = [str(atoms.info.get("mbid")) for atoms in structures]
    for index, name in enumerate(names):
        if name not in ids:
            raise InputError(f"{path}: structure {index} has the mbid {name}, which is none of {task.name}")
    [(name, count)] = Counter(names).most_common(1)
    if count > 1:
        raise InputError(f"{path}: {count} structures have the mbid {name}; use the complete file")
    structures.sort(key=lambda atoms: ids[atoms.info["mbid"]])

    labels = np.array([_label(atoms, task, path) for atoms in structures])
    for atoms, label in zip(structures, labels.tolist(), strict=True):
        atoms.info[task.key] = int(label) if task.kind == "classification" else label
    return Data(task, structures, labels)


def _task_of(path: Path) -> Task:
    for name in (path.name.split(".")[0], path.absolute().parent.name):
        if name in TASKS:
            return TASKS[name]
    raise InputError(f"{path}: neither file nor folder has the name of a task; say which it is (task='jdft2d')")


def _label(atoms: Atoms, task: Task, path: Path) -> float | bool:
    found = atoms.info.get(task.target, atoms.info.get(task.key))
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}: {atoms.info['mbid']} has no number under {task.target!r}, but {found!r}")
    return bool(value) if task.kind == "classification" else value


# ----------------------------------------------------------------------------------------------------------- records


class Record:
    """Predictions for the test part of every fold of a task, with their scores.

    `labels` are those of the whole task in the order of the data: they give the folds and what is right.
    """

    def __init__(self, task: str | Task, labels: Sequence[Any] | np.ndarray) -> None:
        self.task = find_task(task)
        self.labels = _checked_labels(labels, self.task)
        self.ids = self.task.ids
        self.folds = folds(self.task, self.labels)
        self.results: dict[int, dict[str, Any]] = {}  # by fold, as they are written

    def add(
        self,
        fold: int,
        predictions: Mapping[str, Any] | Sequence[Any] | np.ndarray,
        *,
        parameters: Mapping[str, Any] | None = None,
        uncertainty: Mapping[str, Any] | Sequence[Any] | np.ndarray | None = None,
    ) -> dict[str, float]:
        """Keep the predictions for one fold, by id or in the order of its test part, and return their scores.

        Predictions are in the unit of the task; for classes they are booleans, or probabilities of True. `uncertainty`
        are standard deviations, for regression only. `parameters` may be anything that JSON can hold.
        """
        if fold not in range(N_FOLDS):
            raise InputError(f"fold {fold!r} of {self.task.name}: folds are numbered 0 to {N_FOLDS - 1}")
        where = f"fold {fold} of {self.task.name}"
        if fold in self.results:
            raise InputError(f"{where} is recorded already; make a new record to replace it")
        test = self.folds[fold].test
        names = [self.ids[i] for i in test]
        values = _in_order(predictions, names, f"{where}: predictions")
        if self.task.kind == "regression":
            values = values.astype(float)
            scores = _regression_scores(self.labels[test], values)
        else:
            if ((values < 0) | (values > 1)).any():
                raise InputError(f"{where}: a class is True or False, or a probability between 0 and 1")
            values = values if values.dtype == bool else values.astype(float)
            scores = _class_scores(self.labels[test], values > 0.5)

        spread = None
        if uncertainty is not None:
            if self.task.kind == "classification":
                raise InputError(f"{where}: MatBench takes no uncertainty for classes; give probabilities instead")
            sigma = _in_order(uncertainty, names, f"{where}: uncertainties").astype(float)
            if (sigma < 0).any():
                raise InputError(f"{where}: uncertainties are standard deviations and cannot be negative")
            spread = {
                name: {"ci_lower": value - Z_95 * s, "ci_upper": value + Z_95 * s, "std": s}
                for name, value, s in zip(names, values.tolist(), sigma.tolist(), strict=True)
            }
        self.results[fold] = {
            "data": dict(zip(names, values.tolist(), strict=True)),
            "parameters": _plain(parameters or {}, f"{where}: parameters"),
            "scores": scores,
            "uncertainty": spread,
        }
        return scores

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Mean, largest, smallest and standard deviation over the folds recorded so far, of each score."""
        kept = [result["scores"] for result in self.results.values()]
        if not kept:
            raise InputError(f"no fold of {self.task.name} is recorded yet")
        columns = {name: np.array([scores[name] for scores in kept]) for name in kept[0]}
        return {
            name: {"mean": float(x.mean()), "max": float(x.max()), "min": float(x.min()), "std": float(x.std())}
            for name, x in columns.items()
        }

    def save(self, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write this task alone, as `save` does."""
        save(path, self, metadata=metadata)


def save(path: str | Path, *records: Record, metadata: Mapping[str, Any] | None = None) -> None:
    """Write records of several tasks into one file in the official format, compressed where it ends in `.gz`.

    `metadata` says what was done, in anything that JSON can hold. Every task must have all its folds.
    """
    tasks: dict[str, Any] = {}
    for record in records:
        name = record.task.name
        if missing := sorted(set(range(N_FOLDS)) - set(record.results)):
            raise InputError(
                f"{name}: fold {', '.join(map(str, missing))} not recorded yet; MatBench wants all of them"
            )
        if name in tasks:
            raise InputError(f"{name} was given twice; a file holds one record of each task")
        tasks[name] = {
            "@module": "matbench.task",
            "@class": "MatbenchTask",
            "benchmark_name": "matbench_v0.1",
            "dataset_name": name,
            "results": {f"fold_{fold}": result for fold, result in sorted(record.results.items())},
        }
    if not tasks:
        raise InputError(f"{path}: no records to write")
    content = {
        "@module": "matbench.bench",
        "@class": "MatbenchBenchmark",
        "version": VERSION,
        "tasks": tasks,
        "user_metadata": _plain(metadata or {}, "metadata"),
        "benchmark_name": "matbench_v0.1",
        "datestamp": datetime.now(UTC).strftime("%Y.%m.%d %H:%M.%S"),
    }
    content["hash"] = digest(content)
    whole = json.dumps(content, sort_keys=True).encode()
    write_whole(Path(path), gzip.compress(whole, mtime=0) if str(path).endswith(".gz") else whole)


def digest(content: Mapping[str, Any]) -> str:
    """The hash that the file says of itself, and is refused without: of all but its entry `hash`."""
    rest = {key: value for key, value in content.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _checked_labels(labels: Sequence[Any] | np.ndarray, task: Task) -> np.ndarray:
    found = np.asarray(labels)
    if found.shape != (task.size,):
        raise InputError(
            f"{task.name}: labels of shape {found.shape}, but there are {task.size} samples; give all of them"
        )
    if found.dtype.kind not in "biuf" or not np.isfinite(found).all():
        raise InputError(f"{task.name}: every label must be a finite number")
    if task.kind == "regression":
        return found.astype(float)
    if min(np.bincount(found.astype(bool), minlength=2)) < N_FOLDS:
        raise InputError(f"{task.name}: every fold needs samples of both classes, but one has fewer than {N_FOLDS}")
    return found.astype(bool)


def _in_order(given: Mapping[str, Any] | Sequence[Any] | np.ndarray, names: list[str], what: str) -> np.ndarray:
    """Values as one array in the order of `names`: (n_test,)."""
    if isinstance(given, Mapping):
        if wrong := sorted(set(given) - set(names), key=str):
            raise InputError(f"{what}: {wrong[0]} ({len(wrong)} in all) is not in the test part of this fold")
        if lacking := [name for name in names if name not in given]:
            raise InputError(f"{what}: {lacking[0]} ({len(lacking)} in all) is missing")
        given = [given[name] for name in names]
    values = np.asarray(given)
    if values.shape != (len(names),):
        raise InputError(f"{what} of shape {values.shape} for {len(names)} test samples; give one number for each")
    if values.dtype.kind not in "biuf":
        raise InputError(f"{what} are no numbers but {values.dtype}")
    if not np.isfinite(values).all():
        raise InputError(f"{what}: {names[int(np.argmin(np.isfinite(values)))]} is not a finite number")
    return values


def _plain(content: Mapping[str, Any], what: str) -> Any:
    """The same in the types of JSON; arrays become lists."""
    try:
        return json.loads(json.dumps(content, sort_keys=True, default=lambda value: value.tolist()))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{what} cannot be written as JSON ({error}); use numbers, text, lists and dicts") from error


def _regression_scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Errors in the unit of the task; `mape`, a fraction, is over labels that are not nearly zero."""
    error = np.abs(predicted - true)
    large = np.abs(true) > 1e-5
    return {
        "mae": float(error.mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "mape": float((error[large] / np.abs(true[large])).mean()) if large.any() else math.nan,
        "max_error": float(error.max()),
    }


def _class_scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Scores of decisions, True or False.

    MatBench turns probabilities into decisions before the area under the ROC curve, too, which then is the balanced
    accuracy; the same is done here, as the leaderboard compares nothing else.
    """
    hits, misses = int((true & predicted).sum()), int((true & ~predicted).sum())
    alarms, passes = int((~true & predicted).sum()), int((~true & ~predicted).sum())
    balanced = (hits / (hits + misses) + passes / (alarms + passes)) / 2
    return {
        "accuracy": (hits + passes) / len(true),
        "balanced_accuracy": balanced,
        "f1": 2 * hits / max(2 * hits + misses + alarms, 1),
        "rocauc": balanced,
    }
