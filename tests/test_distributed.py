"""Several processes train as one: the same gradients, the same weights, one voice when something fails."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch

import transfermium as tm
from tests.alloys import alloys, painn, ready, same_bits, without
from tests.waters import waters
from transfermium import distributed, objectives
from transfermium.data.load import TRAINING, Batches, Share, count_edges, training_batches
from transfermium.distributed import Place, first_host, place
from transfermium.model import read_tensors
from transfermium.objectives import Objective
from transfermium.objectives.base import told
from transfermium.optim import AdamW
from transfermium.train import TrainConfig, train

STEPS = 12


def all_objectives() -> dict[str, Objective]:
    """Every exported objective, and those whose losses are of derivatives alone."""
    cases: dict[str, Objective] = {
        "forces only": tm.Potential(energy=0, forces=1.0, stress=0),
        "stress only": tm.Potential(energy=0, forces=0, stress=1.0),
        "direct potential": tm.Potential(1.0, 1.0, 1.0, conservative=False),
        "potential": tm.Potential(1.0, 1.0, 1.0),
        "direct denoising": tm.Denoise(conservative=False),
        "denoising when told forces": tm.Denoise([0.05, 0.1], told_forces=True),
        "extensive": tm.Property("gap", "extensive"),
        "classes": tm.Property("gap", task="classification", weight=1.0),
    }
    several = {"field": tm.Potential(1.0, 1.0, 1.0), "noise": tm.Denoise(strain=0.02), "gap": tm.Property("gap")}
    simple = {
        tm.Denoise: lambda: tm.Denoise(),
        tm.Property: lambda: tm.Property("gap"),
        tm.Together: lambda: tm.Together(several),
        tm.Fidelities: lambda: tm.Fidelities(tm.Potential(1.0, 1.0, 1.0), ["pbe", "r2scan"]),
    }
    for name in objectives.__all__:
        kind = getattr(objectives, name)
        if isinstance(kind, type) and issubclass(kind, Objective) and kind is not Objective:
            cases.setdefault(name, simple.get(kind, kind)())
    return cases


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, list[torch.Tensor | None]]:
    return {name: gradients(name) for name in all_objectives()}


class TestGradients:
    """Whoever works on what, the gradient of a step is that of all its structures as one batch."""

    @pytest.mark.parametrize(
        ("processes", "accumulate"), [(2, 1), (3, 1), (2, 7)], ids=["two", "three", "one without any structure"]
    )
    def test_processes_add_up_to_one(self, of_one_process, processes, accumulate, tmp_path):
        run_together(processes, "write_gradients", tmp_path, accumulate)
        for rank in range(processes):
            for name, expected in of_one_process.items():
                assert_same(torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name], expected, name)

    @pytest.mark.parametrize("accumulate", [2, 5])
    def test_so_do_batches_one_after_the_other(self, of_one_process, accumulate):
        for name, expected in of_one_process.items():
            assert_same(gradients(name, accumulate), expected, name)


def structures(kind: str) -> list[Any]:
    """Seven structures of which some lack some labels, so that shares of them lack all labels of a term."""
    found = alloys(7)
    if kind == "MaskAtoms":
        return [waters(4, seed=number) if number % 3 else found[number] for number in range(7)]
    for number, atoms in enumerate(found):
        atoms.info["level"] = "r2scan" if number % 3 == 0 else "pbe"
    for number, atoms in enumerate(found):
        atoms.info["gap"] = number % 2 if kind == "classes" else atoms.info["gap"]
    found[1:4] = without(found[1:4], "forces", "stress")
    found[4:5] = without(found[4:5], "energy")
    del found[5].info["gap"]
    return list(ready(found))


def gradients(name: str, accumulate: int = 1) -> list[torch.Tensor | None]:
    """What is left in `grad` after a step on all structures, whatever number of processes share it."""
    objective = all_objectives()[name]
    torch.manual_seed(0)
    model = tm.Model(told(painn(), objective), objective.outputs(8)).double()
    found, processes = structures(name), distributed.size()
    total = int(count_edges(found, painn().edges).sum())
    edges = 10 * total if processes * accumulate == 1 else -(-2 * total // (processes * accumulate))
    config = TrainConfig(steps=1, edges=edges, accumulate=accumulate, clip=1e9, device="cpu", dtype="float64")
    list(train(model, objective, found, config))
    return [p.grad for p in model.parameters()]


def write_gradients(folder: str, accumulate: str) -> None:
    distributed.join()
    found = {name: gradients(name, int(accumulate)) for name in all_objectives()}
    torch.save(found, Path(folder) / f"{distributed.rank()}.pt")


def assert_same(found: list[torch.Tensor | None], expected: list[torch.Tensor | None], name: str) -> None:
    size = max(float(g.abs().max()) for g in expected if g is not None)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * size, msg=lambda text: f"{name}: {text}")


class TestSums:
    def test_alone_nothing_is_exchanged(self):
        weights = [torch.ones(2, requires_grad=True)]
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.sum_counts({"a": 1.0}) == {"a": 1.0}
        assert distributed.gathered("x") == ["x"] and distributed.from_first(lambda: 3) == 3
        distributed.sum_gradients(weights)
        distributed.barrier()
        assert weights[0].grad is None and distributed.own([1, 2]) == [1, 2]

    def test_what_the_first_refuses_all_refuse(self, tmp_path):
        run_together(2, "ask_the_first", tmp_path)
        told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
        assert told[0] == told[1] == [7, "folder 1 is taken", 7, "folder 3 is taken"]

    def test_each_process_has_a_gpu_of_its_own_from_the_start(self, tmp_path):
        run_together(2, "join_with_gpus", tmp_path)
        assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["cuda:0", "cuda:1"]

    def test_names_that_only_some_have_are_added_up(self, tmp_path):
        run_together(3, "add_up", tmp_path)
        results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
        assert results[0] == results[1] == results[2] == [{"a": 3.0, "r0": 0.0, "r1": 1.0, "r2": 2.0}, {"a": 3.0}, {}]


def add_up(folder: str) -> None:
    distributed.join()
    rank = distributed.rank()
    sums = [distributed.sum_counts(own) for own in ({"a": 1.0, f"r{rank}": float(rank)}, {"a": 1.0}, {})]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(sums))


def ask_the_first(folder: str) -> None:
    """Ask four times, of which every second one is refused, and go on."""

    def make(number: int) -> int:
        if number % 2:
            raise tm.InputError(f"folder {number} is taken")
        return 7

    distributed.join()
    told: list[Any] = []
    for number in range(4):
        try:
            told.append(distributed.from_first(lambda number=number: make(number)))
        except tm.InputError as error:
            told.append(str(error))
    (Path(folder) / f"{distributed.rank()}.json").write_text(json.dumps(told))


def join_with_gpus(folder: str) -> None:
    chosen: list[Any] = []
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.set_device = chosen.append
    torch.distributed.is_nccl_available = lambda: False
    distributed.join()
    distributed.sum_counts({})  # or one would be gone while another still connects to it
    (Path(folder) / str(distributed.rank())).write_text(" ".join(map(str, chosen)))


class TestMemory:
    def test_the_room_of_each_process_is_remembered(self, tmp_path):
        """One of two runs out of memory; stopped and started again, the run is bit for bit the same."""
        run_together(2, "train_in_little_memory", tmp_path, tmp_path / "whole", 0)
        for stop in (4, 0):
            run_together(2, "train_in_little_memory", tmp_path, tmp_path / "stopped", stop)
        found, expected = (read_tensors(tmp_path / name / "state.safetensors") for name in ("stopped", "whole"))
        assert same_bits(found[0], expected[0])
        numbers = json.loads(found[1]["numbers"])
        (room,) = numbers["rooms"].items()
        assert room[0].endswith("1") and room[1] < 400
        assert (tmp_path / "refused").read_text() == "1"  # the second time it was known


def train_in_little_memory(folder: str, out: str, stop: str) -> None:
    distributed.join()
    loss, refused = tm.Potential.loss, []

    def limited(self, outputs, batch):
        if distributed.rank() == 1 and batch.graph.n_edges > 250:
            refused.append(batch.graph.n_edges)
            raise MemoryError
        return loss(self, outputs, batch)

    tm.Potential.loss = limited  # type: ignore[method-assign]
    torch.manual_seed(0)
    objective = tm.Potential(1.0, 1.0, 1.0)
    config = TrainConfig(steps=8, edges=400, device="cpu")
    found = ready(alloys(12))
    Path(out).mkdir(exist_ok=True)
    for progress in train(
        tm.Model(painn(), objective.outputs(8)), objective, found, config, out=Path(out), save_every=0
    ):
        if progress.step == int(stop):
            break
    if distributed.rank() == 1:
        with open(Path(folder) / "refused", "a") as file:
            file.write("1" if refused and Path(out).name == "stopped" else "")


class TestDivergence:
    def test_all_go_back_to_the_same_weights_and_name_the_structures_of_all(self, tmp_path):
        run_together(2, "train_what_diverges", tmp_path)
        found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
        assert same_bits(found[0]["weights"], found[1]["weights"])
        assert found[0]["went back"] == found[1]["went back"] == 4
        assert found[0]["faulty"] == found[1]["faulty"]
        assert "not finite at step 1, for structure 3 (" in found[0]["faulty"]


def train_what_diverges(folder: str) -> None:
    """Weights become useless after the third update; then a structure is faulty, which one of two works on."""
    distributed.join()
    step = AdamW.step

    def spoiled(self):
        step(self)
        if any(int(state["step"]) == 3 for state in self.state.values()):
            for p in self.state:
                p.data.fill_(math.nan)

    AdamW.step = spoiled  # type: ignore[method-assign]
    torch.manual_seed(0)
    objective = tm.Potential(1.0, 1.0, 1.0)
    config = TrainConfig(steps=6, edges=400, device="cpu")
    progress = list(train(model := tm.Model(painn(), objective.outputs(8)), objective, ready(alloys(8)), config))
    AdamW.step = step  # type: ignore[method-assign]
    found = alloys(4)
    found[3].calc.results["energy"] = 1e150
    huge = tm.Potential(energy=1e200, forces=0, stress=0)
    config = TrainConfig(steps=2, edges=400, device="cpu", dtype="float64")
    with pytest.raises(tm.InputError) as refused:
        list(train(tm.Model(painn(), huge.outputs(8)), huge, ready(found), config))
    said = {"weights": dict(model.state_dict()), "went back": progress[-1].went_back, "faulty": str(refused.value)}
    torch.save(said, Path(folder) / f"{distributed.rank()}.pt")


class TestPlace:
    def test_torchrun(self):
        names = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29400"}
        assert place(names) == Place(3, 8, 1, "n1", 29400)

    def test_srun(self):
        names = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
        found = place({**names, "SLURM_STEP_NODELIST": "gpu[07-09],x1", "SLURM_STEP_ID": "2"})
        assert found is not None and found[:4] == (5, 8, 1, "gpu07")
        assert found.port == place({**names, "SLURM_STEP_ID": "2", "SLURM_PROCID": "0"}).port
        assert found.port != place({**names, "SLURM_STEP_ID": "3"}).port

    @pytest.mark.parametrize(
        "alone",
        [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}],
        ids=["nothing", "one process", "a batch script"],
    )
    def test_alone(self, alone):
        assert place(alone) is None

    def test_what_is_no_number(self):
        with pytest.raises(tm.InputError, match="RANK, WORLD_SIZE"):
            place({"RANK": "first", "WORLD_SIZE": "2"})

    @pytest.mark.parametrize(
        ("nodes", "first"),
        [("gpu[07-09,12],x", "gpu07"), ("a,b", "a"), ("n[3]-ib", "n3-ib"), ("localhost", "localhost")],
    )
    def test_first_host(self, nodes, first):
        assert first_host(nodes) == first


class TestShares:
    def test_shares_of_a_step_are_the_step_and_alike(self):
        found = [atoms * (1, 1, 1 + number % 3) for number, atoms in enumerate(alloys(200))]
        counts = count_edges(found, painn().edges)
        budget = 2000
        streams = [
            training_batches(Batches(found, tm.Denoise(), painn().edges, 0), counts, budget, share=Share(rank, 3))
            for rank in range(3)
        ]
        seen: list[int] = []
        for _ in range(4):
            parts = [next(stream)[1] for stream in streams]
            edges = [int(counts[members].sum()) for members in parts]
            seen += [int(i) for members in parts for i in members]
            assert max(edges) <= budget
            assert max(edges) - min(edges) <= counts.min() and min(edges) > 0.9 * budget
        order = np.random.default_rng((0, TRAINING, 0)).permutation(len(found))
        assert sorted(seen) == sorted(order[: len(seen)].tolist())

    def test_a_process_reads_only_what_it_is_dealt(self, tmp_path):
        packed = tm.pack(alloys(40), tmp_path / "packed", progress=False)
        read: list[int] = []

        class Watched(type(packed)):  # type: ignore[misc]
            def __getitem__(self, index):
                read.append(int(index))
                return super().__getitem__(index)

        watched = Watched(packed.path, packed.header, packed.rows)
        counts = count_edges(packed, painn().edges)
        batches = Batches(watched, tm.Denoise(), painn().edges, 0)
        stream = training_batches(batches, counts, 400, share=Share(1, 3))
        dealt = [next(stream)[1] for _ in range(3)]
        assert set(read) == {int(i) for members in dealt for i in members}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("together") / "alloys.extxyz"
    ase.io.write(path, alloys(16))
    return path


@pytest.fixture(scope="module")
def untouched(data) -> Path:
    succeed(together(2, command(data, data.parent / "untouched")))
    return data.parent / "untouched"


class TestCommand:
    """The command line, started by torchrun or as srun would."""

    def test_one_writes_and_speaks(self, data, untouched):
        rows = [json.loads(line) for line in (untouched / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(STEPS + 1))
        first, second = together(2, command(data, untouched))  # finished: returns at once
        assert first.returncode == second.returncode == 0
        assert "Model:" in first.stderr and second.stderr == second.stdout == ""

    def test_killed_and_started_again_it_ends_bit_for_bit_as_if_untouched(self, data, untouched):
        out = data.parent / "killed"
        results = together(2, command(data, out), death=(1, 5))
        assert results[1].returncode == -signal.SIGKILL and results[0].returncode != 0
        assert "another process of this run is gone" in results[0].stderr
        assert not (out / "model.safetensors").exists()
        succeed(together(2, command(data, out)))
        tensors, expected = (read_tensors(folder / "model.safetensors")[0] for folder in (out, untouched))
        assert same_bits(tensors, expected)

    def test_another_number_of_processes_is_another_run(self, data, untouched, tmp_path):
        (untouched / "model.safetensors").rename(tmp_path / "model.safetensors")
        try:
            result = subprocess.run(
                [sys.executable, "-m", "transfermium", *command(data, untouched)], capture_output=True, text=True
            )
            assert result.returncode == 2 and "batches per step was 2 there and is 1 now" in result.stderr
            assert "choose --accumulate times the number of processes to keep it" in result.stderr
        finally:
            (tmp_path / "model.safetensors").rename(untouched / "model.safetensors")

    def test_operations_bound_the_run_of_all(self, data, tmp_path):
        succeed(together(2, [*command(data, tmp_path / "run"), "--flop", "1kFLOP"]))  # less than a step takes
        rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1]

    def test_torchrun_starts_it(self, data, untouched, tmp_path):
        out = tmp_path / "run"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        result = subprocess.run(
            [*launcher, "-m", "transfermium", *command(data, out)],
            capture_output=True, text=True, timeout=120, env=quiet_environment(),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        tensors, expected = (read_tensors(folder / "model.safetensors")[0] for folder in (out, untouched))
        assert same_bits(tensors, expected)

    @pytest.mark.parametrize("failing", [0, 1])
    def test_an_error_of_one_ends_all_with_one_sentence(self, data, tmp_path, failing):
        start = time.monotonic()
        results = together(2, command(data, tmp_path / "run"), failing=(failing, 3))
        assert [result.returncode for result in results] == [2, 2]
        assert [result.stderr.count("error:") for result in results].count(1) == 1
        assert "the disk of rank" in "".join(result.stderr for result in results)
        assert time.monotonic() - start < 60

    def test_what_is_wrong_for_all_is_said_once(self, data, tmp_path):
        results = together(3, [*command(data, tmp_path / "run"), "--valid-fraction", "2"])
        assert [result.returncode for result in results] == [2, 2, 2]
        assert "".join(result.stderr for result in results).count("error:") == 1

    def test_evaluate_and_predict_share_the_work(self, data, untouched, tmp_path):
        model = str(untouched / "model.safetensors")
        alone = subprocess.run(
            [sys.executable, "-m", "transfermium", "evaluate", model, str(data), "--json", "--edges", "600"],
            capture_output=True, text=True,
        )  # fmt: skip
        shared = together(3, ["evaluate", model, str(data), "--json", "--edges", "600"])
        assert json.loads(shared[0].stdout) == json.loads(alone.stdout)
        assert shared[1].stdout == shared[2].stdout == ""
        for number in (1, 3):
            out = tmp_path / f"{number}.extxyz"
            results = together(number, ["predict", model, str(data), "--out", str(out), "--edges", "600"])
            succeed(results)
        assert (tmp_path / "1.extxyz").read_text() == (tmp_path / "3.extxyz").read_text()

    def test_other_verbs_run_once(self, untouched):
        results = together(2, ["info", str(untouched / "model.safetensors"), "--json"])
        assert json.loads(results[0].stdout)["parameters"] and results[1].stdout == ""


# The real command line, which saves at every step; a process may die, or fail to prepare, after so many batches.
COMMAND = """
import os, signal, sys
import torch
import transfermium.cli
from transfermium.data.load import Batches
from transfermium.errors import InputError

torch.set_num_threads(1)
death, failing = int(sys.argv.pop(1)), int(sys.argv.pop(1))
train = sys.modules["transfermium.train"]
train.train.__kwdefaults__["save_every"] = 0.0
step = train._Run._optimise
calls = 0

def optimise(*args):
    global calls
    calls += 1
    if calls == death:
        os.kill(os.getpid(), signal.SIGKILL)
    if calls == failing:
        raise InputError(f"the disk of rank {os.environ['RANK']} is full")
    return step(*args)

train._Run._optimise = optimise
transfermium.cli.main()
"""


def command(data: Path, out: Path) -> list[str]:
    model = "--objective Denoise --backbone PaiNN --backbone.width 8 --backbone.depth 1 --backbone.cutoff 4"
    training = f"--lr 0.01 --steps {STEPS} --edges 400 --device cpu"
    return f"pretrain {data} {model} {training} --out {out}".split()


def together(
    processes: int, arguments: list[str], death: tuple[int, int] = (-1, 0), failing: tuple[int, int] = (-1, 0)
) -> list[subprocess.CompletedProcess[str]]:
    """Run the command line in several processes at once; `death` and `failing` are (rank, step)."""
    limits = [[str(n if rank == who else 0) for who, n in (death, failing)] for rank in range(processes)]
    return start_together(processes, lambda rank: ["-c", COMMAND, *limits[rank], *arguments])


def run_together(processes: int, function: str, *arguments: object) -> None:
    """Call a function of this module in several processes at once."""
    imports = "import sys, torch; torch.set_num_threads(1); import tests.test_distributed as these"
    code = f"{imports}; these.{function}(*sys.argv[1:])"
    succeed(start_together(processes, lambda rank: ["-c", code, *map(str, arguments)]))


def succeed(results: list[subprocess.CompletedProcess[str]]) -> None:
    for result in results:
        assert result.returncode == 0, result.stderr


def start_together(processes: int, python) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, *python(rank)],
            env={**quiet_environment(), **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=150) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(running, outputs, strict=True)
    ]


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
