"""Results: a list of flat records in one JSON file, each measured under one set of conditions."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

RESULTS = Path(__file__).with_name("results.json")

IDENTITY = ("workload", "task", "system", "backbone", "threads", "what")
KEYS = (
    "workload",  # W1, W2, W3; null where there is none
    "task",  # train, infer, infer_ase, prepare, startup, to_accuracy
    "system",
    "version",
    "backbone",
    "parameters",
    "width",
    "layers",
    "edges_per_step",  # directed, within 5 Å
    "stress",  # whether the training step has a stress in its loss
    "structures_per_s",
    "cpu_s",  # processor seconds of what `ms` is the wall time of
    "ms",  # per training step, inference, prepared structure or start
    "seconds_to_target",
    "peak_mb",  # largest resident memory of the process
    "threads",
    "machine",
    "date",
)
EXTRAS = (
    "what",  # startup: import, info, first step
    "load",  # largest one-minute load average at the start of a measurement
    "cap",  # to_accuracy: processor seconds after which each learning rate was given up
    "rounds",  # how often it was measured; numbers are medians
    "torch",
    "baseline_mb",  # peak resident memory before the first graph was made
    "warm_up_s",  # the steps before the clock starts, which compile what is to be compiled
    "target",  # to_accuracy: force MAE, eV/Å
    "best",  # to_accuracy: the lowest force MAE seen
    "lr",
    "steps",
)


def record(**values: Any) -> Record:
    """A record with every key, null where nothing was measured.

    Raises KeyError for a key that records do not have.
    """
    unknown = set(values) - set(KEYS) - set(EXTRAS)
    if unknown:
        raise KeyError(f"a record has no '{min(unknown)}': it has {', '.join(KEYS + EXTRAS)}")
    return {key: values.get(key) for key in KEYS} | {key: values[key] for key in EXTRAS if key in values}


def identity(one: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was measured; a newer record with the same identity replaces the older."""
    return tuple(one.get(key) for key in IDENTITY)


def added(records: Sequence[Record], new: Record) -> list[Record]:
    """The records with a new one, in the place of the one it replaces."""
    if identity(new) not in map(identity, records):
        return [*records, new]
    return [new if identity(old) == identity(new) else old for old in records]


def load(path: Path = RESULTS) -> list[Record]:
    """All records of a file; none where there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else []


def save(records: Sequence[Record], path: Path = RESULTS) -> None:
    """Write all records at once or not at all, one per line."""
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in records)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n")
    os.replace(temporary, path)
