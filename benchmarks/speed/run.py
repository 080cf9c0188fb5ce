"""Measure training, inference, preparation and start-up of transfermium beside its peers.

Every measurement is a process of its own in the environment of its package (see environments.sh); rounds of different
packages alternate, and what is recorded is their median. A finished record is written at once. `--quick` measures
transfermium alone for less than a minute and keeps nothing.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import records
from systems import OURS, SYSTEMS, System

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[2] / "shared" / "data"

WORKLOADS: dict[str, tuple[str | None, ...]] = {
    "train": ("W1", "W2", "W3"),
    "infer": ("W1",),
    "infer_ase": ("W1",),
    "prepare": ("W1", "W2"),
    "startup": (None,),
    "to_accuracy": ("W1",),
}
RATES = (1e-3, 2e-3, 5e-3)
LONGEST = 7200  # seconds that one process may take
SAVE = "import sys, transfermium as tm; tm.Model(tm.TensorNet(64), tm.Potential().outputs(64)).save(sys.argv[1])"

Measures = dict[str, Any]


class Measurement(NamedTuple):
    """One row of the results, before it is measured.

    `what` is of start-ups only: import, info, or first step.
    """

    task: str
    workload: str | None
    threads: int
    system: System | None  # None: torch itself
    what: str | None = None

    @property
    def labels(self) -> dict[str, Any]:
        about: dict[str, Any] = {"task": self.task, "workload": self.workload, "threads": self.threads}
        about |= {"system": self.system.name if self.system else "torch", "backbone": None}
        if self.system and self.what in (None, "first step"):
            about |= {"backbone": self.system.backbone, "width": self.system.width, "layers": self.system.layers}
        return about | ({"what": self.what} if self.what else {})

    def __str__(self) -> str:
        shown = (self.labels.get(key) for key in ("task", "workload", "what", "system", "backbone"))
        return " ".join(filter(None, shown)) + f" (threads: {self.threads})"


def main() -> None:
    """Measure what was asked for, round by round; exits with 1 when something could not be measured."""
    options = parsed()
    if not options.data.is_dir():
        print(f"no public data in {options.data}: name the folder with --data or TRANSFERMIUM_DATA")
        return
    failed: dict[Measurement, str] = {}
    for _, alike in groupby(chosen(options), key=lambda one: (one.task, one.workload, one.threads)):
        failed |= measured_in_turns(list(alike), options)
    for measurement, why in failed.items():
        print(f"not measured: {measurement}: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=HERE / ".environments", help="made by environments.sh")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TRANSFERMIUM_DATA") or DATA))
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--only", nargs="*", default=[], help="workloads, tasks, systems and backbones to measure")
    parser.add_argument("--threads", nargs="*", default=["1", "all"], help="1, all, or a number")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over so many processes")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of one round, after warming up; at least two steps"
    )
    parser.add_argument("--target", type=float, default=0.10, help="force MAE to train to, eV/Å")
    parser.add_argument("--cap", type=float, default=600.0, help="processor seconds to reach it in, per learning rate")
    parser.add_argument("--missing", action="store_true", help="only what has no record yet: resumes after a stop")
    parser.add_argument("--quick", action="store_true", help="transfermium alone, W1, one thread; nothing is kept")
    options = parser.parse_args()
    options.data = options.data.resolve()
    if options.quick:
        options.only, options.threads, options.rounds, options.seconds = ["W1", "train", "infer", OURS], ["1"], 1, 1.0
    return options


# -- what to measure ---------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> list[Measurement]:
    """What `--only` and `--missing` leave, the same task, workload and number of threads together."""
    every = list(everything(options.threads))
    kinds = {key: {one.labels[key] for one in every} - {None} for key in ("task", "workload", "system", "backbone")}
    names = set().union(*kinds.values())
    if unknown := set(options.only) - names:
        sys.exit(f"--only knows no '{min(unknown)}': choose from {', '.join(sorted(names))}")

    asked = {key: values & set(options.only) for key, values in kinds.items()}
    asked = {key: values for key, values in asked.items() if values}
    known = set(map(records.identity, records.load(options.results))) if options.missing else set()
    return [
        one
        for one in every
        if all(one.labels[key] in values for key, values in asked.items()) and records.identity(one.labels) not in known
    ]


def everything(threads: Sequence[str]) -> Iterator[Measurement]:
    counts = list(dict.fromkeys((os.cpu_count() or 1) if n == "all" else int(n) for n in threads))
    for task, workloads in WORKLOADS.items():
        offered = [system for system in SYSTEMS if task not in system.without]
        for workload in workloads:
            for n in counts[:1] if task in ("prepare", "startup") else counts:  # those two use one thread anyway
                if task == "startup":
                    yield from starts(n)
                else:
                    yield from (Measurement(task, workload, n, system) for system in offered)


def starts(threads: int) -> Iterator[Measurement]:
    """Imports, one per package; and the first step from nothing on, one per architecture."""
    packages = {system.package: system for system in reversed(SYSTEMS)}.values()
    for system in (None, *packages):
        yield Measurement("startup", None, threads, system, "import")
    yield Measurement("startup", None, threads, SYSTEMS[0], "info")
    for system in SYSTEMS:
        yield Measurement("startup", None, threads, system, "first step")


# -- measuring ---------------------------------------------------------------------------------------------------


def measured_in_turns(alike: list[Measurement], options: argparse.Namespace) -> dict[Measurement, str]:
    """Measure A B C A B C ..., keep each record with its last round, and return what failed and why."""
    rounds = 1 if alike[0].task == "to_accuracy" else options.rounds
    found: dict[Measurement, list[Measures]] = {measurement: [] for measurement in alike}
    failed: dict[Measurement, str] = {}
    for number in range(1, rounds + 1):
        for measurement in [one for one in alike if one not in failed]:
            print(f"round {number} of {rounds}: {measurement}", file=sys.stderr, flush=True)
            load = os.getloadavg()[0]
            try:
                found[measurement].append(measure(measurement, options) | {"load": load})
            except (subprocess.SubprocessError, FileNotFoundError) as error:
                failed[measurement] = reason(error)
                print(f"  failed: {failed[measurement]}", file=sys.stderr)
                continue
            if number == rounds:
                keep(finished(measurement, found[measurement]), options)
    return failed


def measure(measurement: Measurement, options: argparse.Namespace) -> Measures:
    """One round."""
    system, task, what = measurement.system, measurement.task, measurement.what
    call = Call(environment(system, options), measurement.threads)
    if what == "import":
        module, package = (system.module, system.package) if system else ("torch", "torch")
        return call.python(HERE / "importing.py", module, package)
    if what == "info":
        with tempfile.TemporaryDirectory() as folder:
            model = f"{folder}/model"
            call.output("python", "-c", SAVE, model)
            measures, _ = call.timed("transfermium", "info", model)
            return measures | {"version": version(OURS), "torch": version("torch")}

    assert system is not None
    job = system._asdict() | {
        "without": None,
        "task": task,
        "workload": measurement.workload or "W1",
        "threads": measurement.threads,
        "compiled": "compiled" in system.name,
        "data": str(options.data),
        "seconds": options.seconds,
        "target": options.target,
    }
    if what == "first step":
        measures, printed = call.timed("python", HERE / "worker.py", json.dumps(job))
        return json.loads(printed.splitlines()[-1]) | measures
    if task == "to_accuracy":
        return best_of_rates(
            lambda lr, cap: call.python(HERE / "worker.py", json.dumps(job | {"lr": lr, "cap": cap})), options.cap
        )
    return call.python(HERE / "worker.py", json.dumps(job))


def best_of_rates(attempt: Callable[[float, float], Measures], cap: float) -> Measures:
    """The learning rate that reaches the target first, or else comes nearest.

    None is given more processor time than the best one before it needed.
    """
    attempts: list[Measures] = []
    for lr in RATES:
        attempts.append(attempt(lr, min([cap, *(one["cpu_s"] for one in attempts if one["cpu_s"])])))
    arrived = [one for one in attempts if one["cpu_s"]]
    best = min(arrived, key=lambda one: one["cpu_s"]) if arrived else min(attempts, key=lambda one: one["best"])
    return best | {"cap": cap}


class Call(NamedTuple):
    """Programs of one environment, on so many threads."""

    programs: Path
    threads: int

    def python(self, script: Path, *arguments: str) -> Measures:
        """The JSON that a script prints last."""
        return json.loads(self.output("python", script, *arguments).splitlines()[-1])

    def timed(self, program: str, *arguments: str | Path) -> tuple[Measures, str]:
        """Wall and processor time of a whole process, and what it printed."""
        start, cpu = time.perf_counter(), children_cpu()
        printed = self.output(program, *arguments)
        return {"ms": 1e3 * (time.perf_counter() - start), "cpu_s": children_cpu() - cpu}, printed

    def output(self, program: str, *arguments: str | Path) -> str:
        variables = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.programs / program, *arguments],
            env=kept | variables | {"CUDA_VISIBLE_DEVICES": ""},
            check=True,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        ).stdout


def environment(system: System | None, options: argparse.Namespace) -> Path:
    """Where the programs of a system's environment lie; transfermium's is the one that runs this file."""
    if system is None or system.peer == OURS:
        return Path(sys.executable).parent
    programs = options.environments.absolute() / system.peer / "bin"
    if not programs.is_dir():
        raise FileNotFoundError(f"no environment {programs.parent}: make it with environments.sh")
    return programs


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def reason(error: Exception) -> str:
    """The last thing that a process had to say."""
    said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
    return said.splitlines()[-1] if said else str(error)


# -- keeping -----------------------------------------------------------------------------------------------------


def finished(measurement: Measurement, rounds: list[Measures]) -> records.Record:
    """Medians over rounds, with the largest load."""
    first = rounds[0]
    numbers = {k for k, v in first.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    values = {key: rounded(median(one[key] for one in rounds)) if key in numbers else first[key] for key in first}
    load = {"load": round(max(one["load"] for one in rounds), 2), "rounds": len(rounds)}
    about = {"machine": machine(), "date": date.today().isoformat()}
    return records.record(**measurement.labels | values | load | about)


def keep(record: records.Record, options: argparse.Namespace) -> None:
    shown = ("structures_per_s", "ms", "cpu_s", "seconds_to_target", "best", "peak_mb")
    print("  " + ", ".join(f"{key} {record[key]}" for key in shown if record.get(key) is not None), file=sys.stderr)
    if options.quick:
        print(json.dumps(record, ensure_ascii=False))
    else:
        records.save(records.added(records.load(options.results), record), options.results)


def rounded(value: float) -> float:
    """Four digits; more would be noise."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def machine() -> str:
    """Processor, cores, memory and system, as one line."""
    info = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()}"


if __name__ == "__main__":
    main()
