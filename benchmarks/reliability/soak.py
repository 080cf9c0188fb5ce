"""Every long verb, killed again and again: the same command ends as if nobody had touched it.

Each verb first runs untouched. Then it is killed (SIGKILL) at random times, and right before random accesses to its
files; ended with SIGTERM; and run with a limit on the size of files, which is how a full disk looks from inside. The
same command follows until it is done, and what it left is compared with what the untouched one left, numbers bit for
bit. Takes about ten minutes of one core; `--quick` takes a minute and keeps no result, and so do some `--verbs`.

Processes are forked from one that has imported everything, so that a run takes seconds less. Studies compute their
cells in a thread instead of processes of their own, for the same reason.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import numpy as np
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from transfermium import cli
from transfermium.errors import InputError
from transfermium.model import UNFINISHED, read_tensors
from transfermium.study import cells

HERE = Path(__file__).parent
RESULTS = HERE / "soak.json"
LOGS = ("metrics.jsonl", "log.csv", "trajectory.extxyz", "relaxed.extxyz", "relaxed.extxyz.jsonl", "lock")  # that grow
CLOCKS = {  # what differs between two runs that do the same
    "seconds", "processor seconds", "elapsed", "cpu", "date", "seconds per step", "train_seconds", "pretrain_seconds",
}  # fmt: skip
PATIENCE = 120.0  # seconds that a command may take

SMALL = "--backbone PaiNN --backbone.width 8 --backbone.depth 1 --backbone.cutoff 4"
TRAINING = "--lr 0.01 --edges 400 --device cpu --split-by random"


class Verb(NamedTuple):
    """A command line, in which {data}, {model} and {out} stand for paths."""

    command: str
    out: str = "run"  # what it writes
    same: bool = True  # as another run of the same; else only what was finished stays as it was


VERBS = {
    "pack": Verb("pack {data}/many.extxyz --out {out}"),
    "pretrain": Verb(
        f"pretrain {{data}}/alloys.extxyz --objective Potential {SMALL} {TRAINING} --steps 40 --out {{out}}"
    ),
    "finetune": Verb(
        f"finetune {{model}} {{data}}/alloys.extxyz --objective Potential {TRAINING} --steps 40 --out {{out}}"
    ),
    "md": Verb("md {model} {data}/one.extxyz --timestep 1fs --time 300steps --every 20steps --device cpu --out {out}"),
    "relax": Verb("relax {model} {data}/few.extxyz --steps 15 --device cpu --out {out}", "relaxed.extxyz"),
    "predict": Verb("predict {model} {data}/many.extxyz --edges 400 --device cpu --out {out}", "predicted.extxyz"),
    "curve": Verb(
        "curve {data}/others.extxyz --objective Property --objective.name gap --base {model} --sizes 5,10 --seeds 2 "
        "--arms scratch full --rates 0.01 --tuning 8steps --edges 400 --out {out}"
    ),
    "bakeoff": Verb(
        "bakeoff {data}/alloys.extxyz --target {data}/few.extxyz --property gap --arms scratch e_derivative "
        f"--pretraining 0.3s --tuning 0.3s --seeds 2 --rates 0.01 {SMALL} --edges 400 --out {{out}}",
        same=False,  # its runs are bounded by time
    ),
}


class Ended(NamedTuple):
    """How a command ended."""

    status: int  # of its exit; minus the signal, where it was ended by one
    said: str
    seconds: float  # of processor time
    late: bool  # it hung, and was killed for that


class Soak:
    """One verb in one folder, and what was found wrong with it."""

    def __init__(self, name: str, data: Path, folder: Path, seed: int):
        self.name, self.verb = name, VERBS[name]
        self.data, self.folder = data, folder
        self.rng = random.Random(f"{name} {seed}")
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.number = 0
        self.run_here(self.new())  # what is imported and compiled once, no copy has to any more
        self.expected = self.new()
        untouched = self.run(self.expected)
        self.done = untouched.status
        self.must(
            self.done in (0, 1), f"untouched it ends with {self.done}: {untouched.said}"
        )  # 1: not all came to rest
        again = self.run(self.expected)  # finished: nothing changes
        self.must(again.status == self.done, f"given again it ends with {again.status}: {again.said}")
        self.seconds = untouched.seconds

    def new(self) -> Path:
        """A folder in which nothing has been done."""
        self.number += 1
        folder = self.folder / f"{self.name}-{self.number}"
        folder.mkdir(parents=True)
        return folder

    def run_here(self, folder: Path) -> None:
        nowhere = io.StringIO()
        with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere), contextlib.suppress(SystemExit):
            cli.main(self.words(folder))
        while threading.active_count() > 1:  # of progress bars, which end soon: copies would lack them
            time.sleep(0.05)

    def words(self, folder: Path) -> list[str]:
        out, model = folder / self.verb.out, self.data / "model.safetensors"
        return self.verb.command.format(data=self.data, model=model, out=out).split()

    def run(self, folder: Path, before: Callable[[], None] = lambda: None, at: float = PATIENCE, by: int = 9) -> Ended:
        """The command in a process of its own, which gets a signal `by` after so many seconds of processor time."""
        words = self.words(folder)
        ended = forked(lambda: cli.main(words), folder / "said.txt", before, at, by)
        self.must(not ended.late, f"it hangs: no end after {PATIENCE:g} s: {ended.said}")
        return ended

    def interrupted_in_turn(self) -> None:
        """In all ways, one after the other, in the same folder; those first that do not depend on the clock."""
        folder = self.new()
        largest = self.largest()
        ways: dict[str, dict[str, Any]] = {
            "kills before an access": {"before": lambda: die_at_access(folder, self.rng.randint(2, 3))},
            "full disks": {"before": lambda: limit_files(largest // 2)},
            "kills": {"at": self.rng.uniform(0, self.seconds)},
            "SIGTERM": {"at": self.rng.uniform(0.2, 0.8) * self.seconds, "by": signal.SIGTERM},
        }
        for way, how in ways.items():
            self.counts[way] += self.run(folder, **how).status != self.done
            self.check_nothing_is_torn(folder)
        self.finish(folder)

    def killed_at_random_times(self, kills: int) -> None:
        while self.counts["kills"] < kills:
            folder = self.new()
            for _ in range(4):
                ended = self.run(folder, at=self.rng.uniform(0, self.seconds))
                if ended.status == self.done:
                    break
                self.counts["kills"] += ended.status == -signal.SIGKILL
                self.must(ended.status == -signal.SIGKILL, f"it ends with {ended.status}: {ended.said}")
                self.check_nothing_is_torn(folder)
            self.finish(folder)

    def killed_before_accesses(self, most: int) -> None:
        """At files and folders that it opens for writing, makes, renames or removes."""
        folder = self.new()
        accesses = folder / "accesses"
        self.run(folder, lambda: count_accesses(folder, accesses))
        total = int(accesses.read_text())
        self.counts["accesses"] = total
        for number in sorted(self.rng.sample(range(1, total + 1), min(most, total))):
            folder = self.new()
            ended = self.run(folder, lambda f=folder, n=number: die_at_access(f, n))  # type: ignore[misc]
            self.counts["kills before an access"] += ended.status == -signal.SIGKILL
            self.must(ended.status in (self.done, -signal.SIGKILL), f"it ends with {ended.status}: {ended.said}")
            self.check_nothing_is_torn(folder)
            self.finish(folder)

    def terminated(self, times: int) -> None:
        for _ in range(times):
            folder = self.new()
            ended = self.run(folder, at=self.rng.uniform(0.2, 1.0) * self.seconds, by=signal.SIGTERM)
            if ended.status != self.done:
                self.counts["SIGTERM"] += 1
                told = "interrupted: the same command goes on" in " ".join(ended.said.split())
                early = ended.status == -signal.SIGTERM  # before the command line has begun
                self.must(early or (told and ended.status == 143), f"SIGTERM gives {ended.status}: {ended.said}")
                left = [path.name for path in leftovers(folder)]
                self.must(not left, f"SIGTERM leaves {', '.join(left)}")
            self.check_nothing_is_torn(folder)
            self.finish(folder)

    def out_of_disk(self, limits: int) -> None:
        """With files that can grow no further than to a part of the largest that the command writes."""
        largest = self.largest()
        for number in range(limits):
            folder = self.new()
            ended = self.run(folder, lambda n=number: limit_files(largest * (n + 1) // (limits + 1)))  # type: ignore[misc]
            self.counts["full disks"] += ended.status != self.done
            said = " ".join(ended.said.split())
            told = "File too large" in said or "cells failed" in said  # of a study, its cells
            self.must(
                ended.status == 2 and told and "Traceback" not in said, f"a full disk gives {ended.status}: {said}"
            )
            self.check_nothing_is_torn(folder)
            self.finish(folder)

    def largest(self) -> int:
        """Bytes of the largest file that the command writes."""
        out = self.expected / self.verb.out
        return max(path.stat().st_size for path in (out, *out.rglob("*")) if path.is_file())

    def finish(self, folder: Path) -> None:
        """Give the command until it is done, which it must be at once, and compare."""
        before = finished_cells(folder)
        ended = self.run(folder)
        self.must(ended.status == self.done, f"afterwards it ends with {ended.status}: {ended.said}")
        if ended.status == self.done:
            self.counts["compared"] += 1
            for text in self.differences(folder, before):
                self.must(False, text)
        shutil.rmtree(folder)

    def differences(self, folder: Path, before: dict[str, str]) -> Iterator[str]:
        if left := leftovers(folder):
            yield f"{left[0].name} was left behind"
        now = finished_cells(folder)
        for name, content in before.items():
            if now.get(name) != content:
                yield f"the finished cell {name} was done again"
        found, expected = (listed(f / self.verb.out) for f in (folder, self.expected))
        if self.verb.same:
            for name in sorted({*found, *expected}):
                if name not in found or name not in expected:
                    yield f"{name} is only {'here' if name in found else 'in the untouched run'}"
                elif (one := content_of(found[name])) != content_of(expected[name]):
                    yield f"{name} differs"
                    del one

    def check_nothing_is_torn(self, folder: Path) -> None:
        for name, path in listed(folder / self.verb.out).items():
            if path.name not in LOGS:
                try:
                    content_of(path)
                except Exception as error:
                    self.must(False, f"{name} is half-written: {error}")

    def must(self, holds: bool, text: str) -> None:
        if not holds:
            self.wrong.append(" ".join(text.split())[:300])

    def row(self) -> dict[str, Any]:
        names = ("kills", "kills before an access", "accesses", "SIGTERM", "full disks", "compared")
        counts = {name: self.counts[name] for name in names}
        compared = "bit for bit" if self.verb.same else "finished cells stay"
        return {
            "verb": self.name,
            "seconds": round(self.seconds, 2),
            **counts,
            "compared how": compared,
            "wrong": self.wrong,
        }


def forked(work: Callable[[], None], said: Path, before: Callable[[], None], at: float, by: int) -> Ended:
    """Work done in a copy of this process, which gets a signal after so many seconds of processor time."""
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        status = 70
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(2, 1)
            before()
            work()
            status = 0
        except SystemExit as ending:
            status = int(ending.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    sent = late = False
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        late = time.monotonic() - start > PATIENCE
        if late or (not sent and at < PATIENCE and processor_seconds(pid) > at):
            os.kill(pid, signal.SIGKILL if late else by)
            sent = True
        time.sleep(0.002)
    status, usage = os.waitstatus_to_exitcode(ended[1]), ended[2]
    said_text = said.read_text(errors="replace") if said.exists() else ""
    return Ended(status, said_text, usage.ru_utime + usage.ru_stime, late)


def processor_seconds(pid: int) -> float:
    """Of a process so far: the machine may be busy with others."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def in_a_thread(workers: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def accesses_to(folder: Path, seen: Callable[[], None]) -> None:
    """From now on, call before each access that changes something below a folder."""
    root = str(folder) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.truncate", "os.chmod"):
            path = arguments[0]
        else:
            return
        path = os.fspath(path) if not isinstance(path, int) else ""
        if str(path).startswith(root):
            seen()

    sys.addaudithook(hook)


def count_accesses(folder: Path, into: Path) -> None:
    handle = os.open(into, os.O_WRONLY | os.O_CREAT)
    number = 0

    def seen() -> None:
        nonlocal number
        number += 1
        os.pwrite(handle, str(number).encode(), 0)

    accesses_to(folder, seen)


def die_at_access(folder: Path, number: int) -> None:
    def seen() -> None:
        nonlocal number
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    accesses_to(folder, seen)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(UNFINISHED)]


def finished_cells(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.rglob("cells/*/result.json")}


def listed(out: Path) -> dict[str, Path]:
    """The files of a run by name, without those that are hidden."""
    files = [out, *out.parent.glob(f"{out.name}.jsonl")] if out.is_file() else out.rglob("*")
    return {str(p.relative_to(out.parent)): p for p in files if p.is_file() and not p.name.startswith(".")}


def content_of(path: Path) -> Any:
    """What must be the same in two runs; raises where a file is not whole."""
    if path.suffix == ".safetensors":
        tensors, about = read_tensors(path)
        raw = {name: (t.dtype, t.shape, t.contiguous().numpy().tobytes()) for name, t in tensors.items()}
        return raw, {name: without_clocks(json.loads(text)) for name, text in about.items() if text[:1] in "{["}
    if path.suffix == ".html":
        if not path.read_text().rstrip().endswith("</html>"):
            raise InputError("it has no end")
        return None  # says when it was written
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        return [without_clocks(json.loads(line)) for line in lines]
    if path.suffix == ".csv":
        return [without_clocks(row) for row in csv.DictReader(io.StringIO(path.read_text()))]
    if path.suffix == ".arrow":
        import pyarrow as pa

        pa.ipc.open_file(str(path)).get_batch(0)
    return path.read_bytes()


def without_clocks(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_clocks(value) for name, value in content.items() if name not in CLOCKS}
    if isinstance(content, list):
        return [without_clocks(value) for value in content]
    return content


def write_data(folder: Path) -> None:
    """Structures, and a potential of them."""
    structures, others = alloys(48)[:24], alloys(48)[24:]
    ase.io.write(folder / "alloys.extxyz", structures)
    ase.io.write(folder / "others.extxyz", others)  # that no model has seen
    ase.io.write(folder / "few.extxyz", structures[:12])
    ase.io.write(folder / "one.extxyz", structures[0] * (2, 1, 1))
    ase.io.write(folder / "many.extxyz", [structures[i % 24] for i in range(600)])
    model = tm.pretrain(
        structures, tm.Potential(), tm.PaiNN(width=8, depth=1, cutoff=4.0, radial=6), steps=60, lr=0.01, edges=400,
        device="cpu", split_by="random", verbose=False,
    )  # fmt: skip
    model.save(folder / "model.safetensors")


def alloys(n: int) -> list[ase.Atoms]:
    """Rattled and strained copper-gold cells of 4 atoms, labelled by effective medium theory."""
    rng, result = np.random.default_rng(0), []
    for number in range(n):
        atoms = bulk("Cu", "fcc", a=3.7 + 0.3 * rng.random(), cubic=True)
        atoms.numbers[:] = [29, 79, rng.choice([29, 79]), rng.choice([29, 79])]
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), scale_atoms=True)
        atoms.positions += 0.1 * rng.normal(size=(4, 3))
        atoms.info |= {"gap": float(atoms.get_volume() / 10), "material_id": f"m{number}"}
        atoms.calc = EMT()
        labels = {name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces", "stress")}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        result.append(atoms)
    return result


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of Markdown."""
    lines = [
        "| verb | untouched, s | killed at random times | before an access to files (of) | SIGTERM | full disk | "
        "compared | wrong |",
        "|" + "---|" * 8,
    ]
    for r in rows:
        lines.append(
            f"| {r['verb']} | {r['seconds']:.1f} | {r['kills']} | {r['kills before an access']} ({r['accesses']}) | "
            f"{r['SIGTERM']} | {r['full disks']} | {r['compared']}, {r['compared how']} | {len(r['wrong'])} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each verb once in each way, and no result is kept")
    parser.add_argument("--verbs", nargs="+", default=list(VERBS), choices=list(VERBS))
    parser.add_argument("--kills", type=int, default=20, help="at random times")
    parser.add_argument("--accesses", type=int, default=12, help="accesses to files to die before, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="only say what was found, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells._processes = in_a_thread
    with tempfile.TemporaryDirectory() as name:
        data, rows = Path(name) / "data", []
        data.mkdir()
        write_data(data)
        for verb in options.verbs:
            soak = Soak(verb, data, Path(name), options.seed)
            if options.quick and not soak.wrong:
                soak.interrupted_in_turn()
            elif not soak.wrong:
                soak.killed_at_random_times(options.kills)
                soak.killed_before_accesses(options.accesses)
                soak.terminated(2)
                soak.out_of_disk(2)
            rows.append(soak.row())
            print(json.dumps(rows[-1], ensure_ascii=False), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    results = {
        "date": date.today().isoformat(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("numpy", "torch", "ase")}},
        "verbs": rows,
    }
    print("\n".join(table(rows)))
    if not options.quick and options.verbs == list(VERBS):
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if any(row["wrong"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
