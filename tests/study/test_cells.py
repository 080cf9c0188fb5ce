"""A cell is done once, whoever is interrupted, killed or started twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

import transfermium as tm
from transfermium.bars import Bars
from transfermium.errors import InputError
from transfermium.model import held
from transfermium.study import cells as cells_module
from transfermium.study.cells import Cell, Done, Failed, run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def pool() -> Iterator[Executor]:
    """Cells in this process, which is quicker than starting others."""
    with ThreadPoolExecutor(4) as executor:
        yield executor


def square(folder: Path, x: int, log: str = "") -> int:
    with open(folder / "calls", "a") as calls:
        calls.write("called\n")
    if log:
        with open(log, "a") as file:
            file.write(f"{x}\n")
    return x * x


def add(folder: Path, left: Done, right: Done, **key: Any) -> int:
    return left.result + right.result


def multiply(folder: Path, left: Done, right: Done, **key: Any) -> int:
    return left.result * right.result


def squares(n: int, **arguments: Any) -> list[Cell]:
    return [Cell({"x": x}, square, arguments) for x in range(n)]


def calls(cell: Cell, out: Path) -> int:
    return len((cell.folder(out) / "calls").read_text().splitlines())


# -------------------------------------------------------------------------------------------------- done once, kept


def test_each_cell_is_done_once(tmp_path: Path, pool: Executor) -> None:
    cells = squares(5)
    assert dict(run(cells, tmp_path, executor=pool, quiet=True)) == {cell: cell.key["x"] ** 2 for cell in cells}
    assert dict(run(cells, tmp_path, executor=pool, quiet=True)) == {cell: cell.key["x"] ** 2 for cell in cells}
    assert [calls(cell, tmp_path) for cell in cells] == [1] * 5

    more = dict(run(squares(6), tmp_path, executor=pool, quiet=True))
    assert list(more.values())[-1] == 25 and calls(cells[0], tmp_path) == 1


def test_a_folder_says_what_its_cell_is(tmp_path: Path, pool: Executor) -> None:
    (cell,) = dict(run(squares(1), tmp_path, executor=pool, quiet=True))
    found = json.loads((cell.folder(tmp_path) / "result.json").read_text())
    assert found.pop("in full") == [{}, {"x": 0}]
    assert found == {"work": "square", "version": 1, "key": {"x": 0}, "arguments": {}, "needs": {}, "result": 0}
    assert cell.folder(tmp_path).name.startswith("square-0-")


def test_whatever_changes_a_result_makes_another_cell() -> None:
    base = Cell({"x": 1}, square)
    cell = Cell({"seed": 0}, add, {"objective": tm.Potential()}, {"left": base, "right": base})
    others = [
        Cell({"seed": 1}, add, {"objective": tm.Potential()}, {"left": base, "right": base}),
        Cell({"seed": 0}, add, {"objective": tm.Potential(forces=3.0)}, {"left": base, "right": base}),
        Cell({"seed": 0}, multiply, {"objective": tm.Potential()}, {"left": base, "right": base}),
        Cell({"seed": 0}, add, {"objective": tm.Potential()}, {"left": base, "right": Cell({"x": 2}, square)}),
        Cell({"seed": 0}, add, {"objective": tm.Potential()}, {"left": base, "right": base}, version=2),
    ]
    assert len({cell, *others}) == 6
    same = Cell({"seed": 0}, add, {"objective": tm.Potential()}, {"left": base, "right": base}, steps=7)
    assert same == cell and same.name == cell.name


def told(folder: Path, objective: Any) -> str:
    return type(objective).__name__


def test_a_new_argument_changes_nothing_and_a_new_default_is_noticed(tmp_path: Path, pool: Executor) -> None:
    class Before(tm.Denoise):
        def __init__(self, sigma: float = 0.1):
            super().__init__(sigma)

    class After(tm.Denoise):
        def __init__(self, sigma: float = 0.1, new: int = 3):
            super().__init__(sigma)
            self.new = new

    class Otherwise(Before):
        def __init__(self, sigma: float = 0.2):
            super().__init__(sigma)

    Before.__name__ = After.__name__ = Otherwise.__name__ = "Noise"
    before, after, changed, otherwise = (
        Cell({}, told, {"objective": objective}) for objective in (Before(), After(), After(new=4), Otherwise())
    )
    assert before == after == otherwise != changed
    assert list(run([before], tmp_path, executor=pool)) == [(before, "Noise")]
    assert list(run([after], tmp_path, executor=pool)) == [(before, "Noise")]
    with pytest.raises(InputError, match="was done with other defaults"):
        list(run([otherwise], tmp_path, executor=pool))


def test_a_needed_cell_comes_first_and_is_handed_over(tmp_path: Path, pool: Executor) -> None:
    two, three = Cell({"x": 2}, square), Cell({"x": 3}, square)
    total = Cell({"what": "sum"}, add, needs={"left": two, "right": three})
    assert dict(run([total], tmp_path, executor=pool, quiet=True)) == {two: 4, three: 9, total: 13}


def test_cells_begin_in_the_order_given(tmp_path: Path, pool: Executor) -> None:
    order = [3, 0, 2, 1]
    cells = [Cell({"x": x}, square, {"log": str(tmp_path / "log")}) for x in order]
    assert len(dict(run(cells, tmp_path, executor=pool, workers=1, quiet=True))) == 4
    assert [int(line) for line in (tmp_path / "log").read_text().split()] == order


def arrays(folder: Path) -> dict[Any, Any]:
    return {1: np.float32(0.5), "pair": (np.arange(2), Path("x"))}


def test_a_result_is_the_same_fresh_and_kept(tmp_path: Path, pool: Executor) -> None:
    cell = Cell({}, arrays)
    fresh = dict(run([cell], tmp_path, executor=pool, quiet=True))
    assert fresh == dict(run([cell], tmp_path, quiet=True)) == {cell: {"1": 0.5, "pair": [[0, 1], "x"]}}


# -------------------------------------------------------------------------------------------------------- failures


class Awkward(Exception):
    """An error that does not survive pickling."""

    def __init__(self, one: int, two: int):
        super().__init__(f"{one} and\n{two}")


def fragile(folder: Path, arm: str, cause: str) -> str:
    attempts = folder / "attempts"
    attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
    if Path(cause).exists():
        raise Awkward(1, 2)
    return attempts.read_text()


def test_a_failed_cell_keeps_no_other_from_being_done(tmp_path: Path, pool: Executor) -> None:
    cause = tmp_path / "cause"
    cause.touch()
    broken = Cell({"arm": "broken"}, fragile, {"cause": str(cause)})
    dependent = Cell({"arm": "dependent"}, add, needs={"left": broken, "right": broken})
    found = {}
    with pytest.raises(Failed) as failure:
        for cell, result in run([broken, dependent, *squares(3)], tmp_path, executor=pool, quiet=True):
            found[cell] = result
    assert sorted(found.values()) == [0, 1, 4]
    assert "1 of 5 cells failed, 1 more that need them did not begin" in str(failure.value)
    assert "fragile-broken (Awkward: 1 and 2)" in str(failure.value)
    assert (broken.folder(tmp_path) / "error.txt").read_text().endswith("Awkward: 1 and\n2\n")

    cause.unlink()
    again = dict(run([broken], tmp_path, executor=pool, quiet=True))
    assert again == {broken: "xx"}  # it went on in the same folder
    assert not (broken.folder(tmp_path) / "error.txt").exists()


class Elsewhere(ThreadPoolExecutor):
    """A machine with another disk."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        folder, *rest = args
        return super().submit(fn, Path("/nowhere") / folder.name, *rest, **kwargs)


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with Elsewhere(1) as elsewhere, pytest.raises(InputError, match="does not see /nowhere/square-0-"):
        dict(run(squares(3), tmp_path, executor=elsewhere, quiet=True))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (lambda: Cell({}, lambda folder: 1), "give a function at the top of a module"),
        (lambda: Cell({"x": 1}, square, {"x": 2}), "'x' is given twice to the cell square-1"),
        (lambda: Cell({"y": 1}, square), "square-1 does not fit its function: missing a required argument: 'x'"),
        (lambda: Cell({"x": 1}, square, {"log": Atoms("O")}), "Atoms is not a JSON value, path, objective"),
    ],
)
def test_what_cannot_be_a_cell_is_said(cell: Callable[[], Cell], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        dict(run([cell()], tmp_path, quiet=True))


def test_bad_options_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers is 0"):
        dict(run(squares(1), tmp_path, workers=0, quiet=True))
    with pytest.raises(InputError, match="'node1' is not the address of a Dask scheduler"):
        dict(run(squares(1), tmp_path, executor="node1", quiet=True))
    damaged = squares(1)[0].folder(tmp_path)
    damaged.mkdir(parents=True)
    (damaged / "result.json").write_text("{")
    with pytest.raises(InputError, match=r"result\.json is damaged: delete it"):
        dict(run(squares(1), tmp_path, quiet=True))


def test_a_missing_dask_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'transfermium\[dask\]'"):
        dict(run(squares(1), tmp_path, executor="tcp://localhost:1", quiet=True))


# ----------------------------------------------------------------------------------------- several commands at once


def test_a_cell_of_another_command_is_left_to_it(
    tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "PAUSE", 0.01)
    monkeypatch.setattr(cells_module, "LOOK", 0.01)
    cells = squares(3)
    folder = cells[0].folder(tmp_path)
    folder.mkdir(parents=True)
    found = []
    with held(folder / cells_module.LOCK, make=True) as ours:
        assert ours
        study = run(cells, tmp_path, executor=pool, quiet=True)
        found += [next(study), next(study)]
        assert {cell for cell, _ in found} == set(cells[1:])
        threading.Timer(0.1, lambda: (folder / "result.json").write_text('{"result": "theirs"}')).start()
        time.sleep(0.2)
    assert list(study) == [(cells[0], "theirs")]
    assert not (folder / "calls").exists()


def slow(folder: Path, x: int, log: str) -> int:
    time.sleep(0.1)
    return square(folder, x, log)


def half(out: Path, log: str) -> None:
    cells_module.PAUSE = cells_module.LOOK = 0.05
    cells = [Cell({"x": x}, slow, {"log": log}) for x in range(8)]
    with ThreadPoolExecutor(1) as one:
        assert len(dict(run(cells, out, executor=one, workers=1, quiet=True))) == 8


def test_two_commands_share_the_work(tmp_path: Path) -> None:
    context = get_context("spawn")
    both = [context.Process(target=half, args=(tmp_path, str(tmp_path / "log"))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(int(line) for line in (tmp_path / "log").read_text().split()) == list(range(8))


# ------------------------------------------------------------------------------------------------- local processes


def threads(folder: Path, seed: int) -> list[Any]:
    return [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.getpid()]


def suicide(folder: Path) -> str:
    if not (folder / "tried").exists():
        (folder / "tried").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def test_a_worker_has_one_thread_and_may_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = dict(run([Cell({"seed": seed}, threads) for seed in range(2)], tmp_path, workers=1, quiet=True))
    assert [result[:2] for result in found.values()] == [[1, "1"]] * 2
    assert all(result[2] != os.getpid() for result in found.values())
    assert os.environ["OMP_NUM_THREADS"] == "3"

    with pytest.raises(InputError, match=r"a process died .* these cells were worked on: suicide; the same command"):
        dict(run([Cell({}, suicide)], tmp_path, workers=1, quiet=True))
    assert dict(run([Cell({}, suicide)], tmp_path, workers=1, quiet=True)) == {Cell({}, suicide): "survived"}


def endless(folder: Path, x: int) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def study_without_end(out: Path) -> None:
    dict(run([Cell({"x": x}, endless) for x in range(3)], out, workers=2, quiet=True))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_command(how: signal.Signals, tmp_path: Path) -> None:
    code = f"from pathlib import Path; from tests.study.test_cells import *; study_without_end(Path({str(tmp_path)!r}))"
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore Ctrl-C
    command = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    try:
        await_that(lambda: len(written(tmp_path)) == 2)
        workers = [int(file.read_text()) for file in written(tmp_path)]
        command.send_signal(how)  # to the command alone, as a batch system does
        _, said = command.communicate(timeout=60)
    finally:
        command.kill()
    await_that(lambda: not any(map(runs, workers)))
    assert len(written(tmp_path)) == 2  # the third did not begin
    if how == signal.SIGINT:
        assert said.splitlines()[-1] == "KeyboardInterrupt: 0 of 3 cells are done; the same command goes on"


def test_workers_that_only_begin_are_deaf_to_ctrl_c(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from tests.study.test_cells import *; study_without_end(Path({str(tmp_path)!r}))"
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=heard,
        start_new_session=True,
    )  # fmt: skip
    try:
        await_that(lambda: len(list(tmp_path.glob("cells/*/cell.json"))) == 2)
        time.sleep(0.3)  # they import torch
        os.killpg(command.pid, signal.SIGINT)  # to all, as a terminal does
        _, said = command.communicate(timeout=60)
    finally:
        command.kill()
    assert not written(tmp_path)
    assert said.splitlines()[-1] == "KeyboardInterrupt: 0 of 3 cells are done; the same command goes on"
    assert said.count("Traceback") == 1 and "spawn_main" not in said


def written(out: Path) -> list[Path]:
    return [file for file in out.glob("cells/*/pid") if file.read_text()]


def runs(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def await_that(fact: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------ Dask


@pytest.mark.filterwarnings("default")
def test_a_dask_cluster_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dask = pytest.importorskip("distributed")
    with dask.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address
        two, three = Cell({"x": 2}, square), Cell({"x": 3}, square)
        total = Cell({"what": "sum"}, add, needs={"left": two, "right": three})
        cause = tmp_path / "cause"
        cause.touch()
        broken = Cell({"arm": "broken"}, fragile, {"cause": str(cause)})
        found = {}
        with pytest.raises(Failed, match=r"1 of 5 cells failed: fragile-broken \(Awkward: 1 and 2\)"):
            for cell, result in run(
                [total, broken, Cell({"seed": 0}, threads)], tmp_path, executor=address, quiet=True
            ):
                found[cell] = result
        assert found.pop(Cell({"seed": 0}, threads))[2] != os.getpid()
        assert found == {two: 4, three: 9, total: 13}

        cause.unlink()
        assert dict(run([total, broken], tmp_path, executor=address, quiet=True)) == {**found, broken: "xx"}
    monkeypatch.setattr(cells_module, "PATIENCE", 0.5)
    with pytest.raises(InputError, match="no Dask scheduler answers at"):
        dict(run(squares(1), tmp_path, executor=address, quiet=True))


# -------------------------------------------------------------------------------------------------------- progress


def test_progress_counts_steps_inside_cells(tmp_path: Path) -> None:
    for name, lines in (("a", '{"step": 4}\n{"step": 5}\n'), ("b/c", '{"step": 7}\n{"st'), ("d", "")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    assert cells_module._steps_in(tmp_path) == 12
    (tmp_path / "a/metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(5_000)))
    assert cells_module._steps_in(tmp_path) == 4_999 + 7


def test_kept_cells_are_no_pace_of_this_command(
    tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[float, float]] = []
    add_task = Bars.add_task

    def recorded(self: Bars, *args: Any, **task: Any) -> Any:
        begun.append((task["completed"], task["total"]))
        return add_task(self, *args, **task)

    monkeypatch.setattr(Bars, "add_task", recorded)
    cells = squares(2)
    for some in cells[:1], cells:
        dict(run(some, tmp_path, executor=pool))
    one = cells[0].steps
    assert begun == [(0, one), (one, 2 * one)]


def test_a_cell_that_runs_is_not_done(tmp_path: Path) -> None:
    (cell,) = squares(1)
    cell.folder(tmp_path).mkdir(parents=True)
    (cell.folder(tmp_path) / "metrics.jsonl").write_text(json.dumps({"step": cell.steps}) + "\n")
    assert 0.5 * cell.steps < cells_module._progress(tmp_path, {}, {Future(): cell}, 1)["completed"] < cell.steps


# ------------------------------------------------------------------------------------------------------- the page


def test_the_study_of_the_documentation_runs(tmp_path: Path, pool: Executor) -> None:
    text = (REPOSITORY / "docs/studies.md").read_text()
    page: dict[str, Any] = {"__name__": "grid"}
    exec(text.split("```python\n")[2].split("```")[0], page)
    page |= {"STEPS": 1, "SEEDS": (0,)}
    assert page["study"](tmp_path, executor=pool, quiet=True).value > 0
    assert len(list(tmp_path.glob("cells/*/result.json"))) == 3
