"""What is found once is used again, what is not needed is not loaded, and what does not fit is cut: same results."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import write

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, potential, ready, same_bits, weights_of
from transfermium.cli import main
from transfermium.data import Subset, split
from transfermium.data.load import Batches, Dealt, ahead, count_edges, plan
from transfermium.graph import Batch, Cutoff, Neighbors
from transfermium.model import Model
from transfermium.train import TrainConfig, _Run, evaluate_loss, read_metrics, train

CUTOFF = Cutoff(4.0)
EVERYONE = np.arange(5)


# ---------------------------------------------------------------------------------------------- neighbours are kept


@pytest.mark.parametrize("memory", [0, 3000, 10**9], ids=["none", "some", "all"])
@pytest.mark.parametrize("objective", [tm.Potential(), tm.Denoise(0.1)], ids=["potential", "denoise"])
def test_batches_are_the_same_whatever_is_kept(objective: Any, memory: int) -> None:
    structures = ready(alloys(5))
    kept, fresh = (Batches(structures, objective, CUTOFF, seed=0, memory=m) for m in (memory, 0))
    count_edges(structures, CUTOFF, keep=kept.keep)
    for epoch in range(3):
        assert identical(kept[epoch, EVERYONE], fresh[epoch, EVERYONE])


def test_neighbours_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    structures = ready(alloys(5))
    batches = Batches(structures, tm.Potential(), CUTOFF, seed=0)
    searched = counted_searches(monkeypatch)

    count_edges(structures, CUTOFF, keep=batches.keep)
    for epoch in range(3):
        batches[epoch, EVERYONE]

    assert len(searched) == 5


class Rattled(list[Atoms]):
    """A sequence that augments: every access gives another copy."""

    def __init__(self, structures: Any) -> None:
        super().__init__(structures)
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index: Any) -> Any:
        atoms = super().__getitem__(index).copy()
        atoms.info["energy"] = 0.0
        atoms.positions += self.rng.normal(size=atoms.positions.shape)
        return atoms


def test_atoms_that_are_changed_between_epochs_get_their_own_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    structures = list(ready(alloys(5)))
    kept, fresh = (Batches(structures, tm.Potential(), CUTOFF, seed=0, memory=m) for m in (10**9, 0))
    count_edges(structures, CUTOFF, keep=kept.keep)

    structures[1].positions[0] += 1.5
    structures[2].set_cell(structures[2].cell * 1.3, scale_atoms=False)
    structures[3].pbc = (True, True, False)
    structures[4] = structures[0] * (1, 1, 2)
    assert identical(kept[1, EVERYONE], fresh[1, EVERYONE])
    searched = counted_searches(monkeypatch)
    kept[2, EVERYONE]
    assert not searched
    assert kept.memory == 10**9 - sum(one.bytes for one in kept.kept.values())


@pytest.mark.parametrize("memory", [3000, 10**9])
def test_a_sequence_may_augment_its_structures(memory: int) -> None:
    kept, fresh = (Batches(Rattled(alloys(5)), tm.Potential(), CUTOFF, seed=0, memory=m) for m in (memory, 0))
    for batches in (kept, fresh):
        batches._leaves_atoms  # noqa: B018  (it looks at a structure once)
    for epoch in range(4):
        assert identical(kept[epoch, EVERYONE], fresh[epoch, EVERYONE])
    assert kept.memory == memory - sum(one.bytes for one in kept.kept.values()) >= 0


def test_elements_may_change_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    structures = list(ready(alloys(5)))
    batches = Batches(structures, tm.Potential(), CUTOFF, seed=0)
    batches[0, EVERYONE]
    searched = counted_searches(monkeypatch)
    structures[1].numbers[:] = 79
    assert batches[1, np.array([1])].graph.atomic_numbers.tolist() == [79] * 4
    assert not searched


def test_displaced_atoms_are_searched_every_time_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(alloys(5), tm.Denoise(0.1), CUTOFF, seed=0)
    searched = counted_searches(monkeypatch)
    for epoch in range(3):
        batches[epoch, EVERYONE]
    assert len(searched) == 15
    assert not batches.kept


def test_memory_bounds_what_is_kept() -> None:
    structures = ready(alloys(5))
    batches = Batches(structures, tm.Potential(), CUTOFF, seed=0, memory=3000)
    batches[0, EVERYONE]
    assert 0 < len(batches.kept) < 5
    assert sum(kept.neighbors.bytes for kept in batches.kept.values()) < 3000


def test_compact_neighbours_are_the_same_numbers() -> None:
    far = bulk("Cu") * (2, 2, 2)
    far.positions[0] += 200 * far.cell[0]
    for atoms in (*alloys(2), far, Atoms("H", positions=[[0, 0, 0]])):
        neighbors = CUTOFF.neighbors(atoms)
        compact = neighbors.compact()
        assert all(np.array_equal(a, b) for a, b in zip(neighbors, compact, strict=True))
        assert compact.bytes <= neighbors.bytes


# ------------------------------------------------------------------------------------------------------------- skin


@pytest.mark.parametrize("skin", [0.3, 1.0, 3.0])
def test_results_do_not_depend_on_the_skin(skin: float) -> None:
    with_skin, without = (tm.Calculator(potential(), skin=s) for s in (skin, 0.0))
    for atoms in journey(alloys(1, seed=3)[0] * (2, 1, 1)):
        (energy, forces, stress), expected = results(with_skin, atoms), results(without, atoms)
        assert energy == pytest.approx(expected[0], abs=1e-5)
        assert forces == pytest.approx(expected[1], abs=1e-4)
        assert (stress is None) == (not atoms.pbc.all())
        assert stress == pytest.approx(expected[2], abs=1e-6)


@pytest.mark.parametrize("skin", [0.3, 1.0, 3.0])
def test_a_kept_search_finds_the_neighbours_of_a_fresh_one(skin: float) -> None:
    search = CUTOFF.search(skin)
    for atoms in journey(alloys(1)[0]):
        assert edges(CUTOFF.neighbors(atoms, search)) == edges(CUTOFF.neighbors(atoms))


def test_a_kept_search_refuses_what_a_fresh_one_refuses() -> None:
    atoms = alloys(1)[0]
    search = CUTOFF.search(1.0)
    CUTOFF.neighbors(atoms, search)
    atoms.positions[1] = atoms.positions[0]
    with pytest.raises(tm.InputError, match="two atoms at the same place"):
        CUTOFF.neighbors(atoms, search)


@pytest.mark.parametrize("skin", [-1.0, float("nan"), 50.0])
def test_a_skin_has_to_make_sense(skin: float) -> None:
    with pytest.raises(tm.InputError, match="skin is"):
        tm.Calculator(potential(), skin=skin)


def journey(atoms: Atoms) -> list[Atoms]:
    """Snapshots of atoms that move a little or far, cross the boundary, lose periodicity, change cell and number."""
    rng = np.random.default_rng(0)
    atoms = atoms.copy()
    snapshots = []
    for k in range(40):
        atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
        if k % 7 == 3:
            atoms.wrap()
        if k % 11 == 5:
            atoms.positions[k % len(atoms)] += atoms.cell[0]
        if k % 9 == 4:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.01 * rng.normal(size=(3, 3))), scale_atoms=k % 2 == 0)
        if k in (12, 24, 33):
            atoms.pbc = [(True, True, False), (False, False, False), (True, True, True)][(12, 24, 33).index(k)]
        if k == 18:
            atoms.pbc = True
        if k == 30:
            del atoms[0]
        snapshots.append(atoms.copy())
    return snapshots


def results(calculator: tm.Calculator, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray | None]:
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress() if atoms.pbc.all() else None


def edges(neighbors: Neighbors) -> list[tuple[Any, ...]]:
    assert np.all(np.diff(neighbors.receivers) >= 0)
    return sorted(zip(neighbors.receivers, neighbors.senders, map(tuple, neighbors.shifts), strict=True))


# --------------------------------------------------------------------------------------------------------- the loop


def test_on_a_cpu_batches_come_as_they_are() -> None:
    taken: list[int] = []

    def stream() -> Iterator[Dealt]:
        for epoch in range(3):
            taken.append(epoch)
            yield Dealt(epoch, EVERYONE, None, (epoch, 5))

    made = ahead(stream(), torch.device("cpu"), torch.float32)
    first = next(made)
    assert first == Dealt(0, EVERYONE, None, (0, 5)) and taken == [0]  # nothing is made before it is asked for
    assert [dealt.after for dealt in made] == [(1, 5), (2, 5)]


def test_for_a_gpu_the_next_batch_is_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "pinned", lambda self: self)  # without a GPU there is no such memory
    batches = Batches(ready(alloys(5)), tm.Potential(), CUTOFF, seed=0)
    stream = (Dealt(epoch, EVERYONE, batches[epoch, EVERYONE] if epoch else None, (epoch, 5)) for epoch in range(9))
    made = ahead(stream, torch.device("cuda"), torch.float32)
    first, second = next(made), next(made)
    assert first.batch is None and (second.epoch, second.after) == (1, (1, 5))
    assert second.batch is not None and second.batch.graph.positions.dtype == torch.float32
    made.close()  # type: ignore[attr-defined]
    assert next(stream).epoch in (3, 4)


def test_when_memory_runs_out_the_step_is_the_same_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained()
    sizes = memory_for(monkeypatch, n_edges=250)
    found = trained()

    assert max(sizes) <= 250
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)


def test_a_run_whose_memory_ran_out_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_for(monkeypatch, n_edges=250)
    whole = trained(dtype="float32", steps=8)
    for stopped in (2, 5):
        sizes = memory_for(monkeypatch, n_edges=250 if stopped == 2 else 10**6)  # and no memory for more is tried again
        trained(dtype="float32", steps=8, out=tmp_path, until=stopped)
        assert max(sizes) <= 250
    assert same_bits(trained(dtype="float32", steps=8, out=tmp_path), whole)
    assert all(row["edges at once"] <= 250 for row in read_metrics(tmp_path)[-4:])


def test_a_structure_that_memory_has_no_room_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    structures = alloys(8)
    structures[5] = structures[5] * (2, 2, 2)  # without labels
    n_edges = len(CUTOFF.neighbors(structures[5]).senders)
    memory_for(monkeypatch, n_edges=n_edges - 1)
    with pytest.raises(tm.InputError, match=rf"memory has no room for structure 5 of {n_edges} edges: leave it out"):
        trained(Subset(ready(structures), [7, 6, 5, 4]))


def test_validation_goes_on_in_smaller_batches_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    structures, members = ready(alloys(8)), [np.arange(5), np.arange(5, 8)]
    batches = Batches(structures, tm.Potential(), CUTOFF, seed=0)
    expected = evaluate_loss(potential(), batches, members)
    sizes = memory_for(monkeypatch, n_edges=250)
    assert evaluate_loss(potential(), batches, members) == pytest.approx(expected, rel=1e-6)
    assert max(sizes) <= 250
    memory_for(monkeypatch, n_edges=20)
    with pytest.raises(tm.InputError, match="memory has no room for structure 0 of 4 atoms: leave it out"):
        evaluate_loss(potential(), batches, members)


def test_so_do_evaluations_and_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> Any:
        errors = tm.evaluate(potential(), alloys(8), edges=800, device="cpu", verbose=False)
        predicted = tm.predict(potential(), alloys(8), edges=800, device="cpu", verbose=False)
        return errors["forces"]["mae"], [atoms.get_potential_energy() for atoms in predicted]

    (mae, energies), forward = answers(), Model.forward

    def failing(most: int) -> None:
        def call(self: Model, graph: Any, *arguments: Any) -> Any:
            if graph.n_systems > most:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return forward(self, graph, *arguments)

        monkeypatch.setattr(Model, "forward", call)

    failing(2)
    assert answers()[0] == pytest.approx(mae, rel=1e-5)
    assert answers()[1] == pytest.approx(energies, abs=1e-5)
    failing(0)
    for verb in (tm.evaluate, tm.predict):
        with pytest.raises(tm.InputError, match="memory has no room for structure 0 of 4 atoms"):
            verb(potential(), alloys(8), device="cpu", verbose=False)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(tm.Potential, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        trained()


# ---------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_counts_measures_and_leaves_everything_as_it_is(tmp_path: Any) -> None:
    structures = alloys(12)
    options = {**QUICK, "valid_fraction": 0.25, "steps": 600}
    model = tm.pretrain(structures, tm.Potential(), painn(), out=tmp_path / "run", dry_run=True, **options)
    untrained = tm.pretrain(structures, tm.Potential(), painn(), **{**options, "steps": 0})
    cost = model.card["dry run"]

    assert not list(tmp_path.iterdir())
    assert same_bits(weights_of(model), weights_of(untrained))
    assert (cost["structures"], cost["validation_structures"]) == (9, 3)
    assert (cost["done"], cost["steps"]) == (0, 600)
    assert cost["parameters"] == cost["trained_parameters"] == sum(p.numel() for p in model.parameters())
    sizes = count_edges([structures[i] for i in split(structures, 0.25, by="random").train], CUTOFF)
    assert (cost["edges"], cost["largest"]) == (sizes.sum(), sizes.max())
    assert cost["steps_per_epoch"] == len(plan(sizes, QUICK["edges"], np.arange(9)))
    validations = 600 // 30 + 1
    expected = 600 * cost["step_seconds"] + validations * cost["validation_seconds"]
    assert cost["minutes"] * 60 == pytest.approx(expected, rel=1e-9)


def test_a_dry_run_tells_what_is_left_of_a_run_and_touches_nothing(tmp_path: Path) -> None:
    objective = tm.Potential()
    arguments = (alloys(12), objective, painn())
    options = {**QUICK, "valid_fraction": 0.25, "steps": 40, "out": tmp_path / "run"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.__kwdefaults__, "save_every", 0.0)
        patch.setattr(tm.Potential, "loss", interrupting(tm.Potential.loss, after=30))
        with pytest.raises(KeyboardInterrupt):
            tm.pretrain(*arguments, **options)
    done = read_metrics(tmp_path / "run")[-1]["step"]
    before = contents(tmp_path)

    cost = tm.pretrain(*arguments, dry_run=True, **options).card["dry run"]
    assert 0 < done < 40 and (cost["done"], cost["steps"]) == (done, 40 - done)
    with pytest.raises(tm.InputError, match=r"holds another run: train\.lr was 0\.002 there"):
        tm.pretrain(*arguments, dry_run=True, lr=0.1, **options)
    assert contents(tmp_path) == before

    tm.pretrain(*arguments, **options)
    cost = tm.pretrain(*arguments, dry_run=True, **options).card["dry run"]
    assert (cost["done"], cost["steps"], cost["minutes"]) == (40, 0, 0)


def test_a_dry_run_times_steps_that_have_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    structures = alloys(40)
    for atoms in structures[:38]:
        del atoms.info["gap"]
    structures[0] *= (1, 1, 2)  # the largest, without a label
    optimised: list[tuple[int, bool]] = []
    optimise = _Run._optimise

    def watched(self: _Run, pieces: Any) -> Any:
        loss, terms = optimise(self, pieces)
        optimised.append((len(pieces[0].members), bool(terms)))
        time.sleep(0.2 if terms else 0.0)
        return loss, terms

    monkeypatch.setattr(_Run, "_optimise", watched)
    options = {**QUICK, "edges": 1, "valid_fraction": 0.0}
    cost = tm.pretrain(structures, tm.Property("gap"), painn(), dry_run=True, **options).card["dry run"]
    assert optimised[0] == (1, True)  # the first is the largest with a label
    assert sum(labelled for _, labelled in optimised) == 4
    assert cost["step_seconds"] > 0.2


def test_a_dry_run_on_the_command_line_prints_and_writes_nothing(tmp_path: Any, capsys: Any) -> None:
    write(tmp_path / "a.extxyz", alloys(6))
    model = "--backbone PaiNN --backbone.width 8 --backbone.depth 1 --edges 400 --device cpu"
    main(f"pretrain {tmp_path}/a.extxyz --objective Potential {model} --out {tmp_path}/run --dry-run".split())
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("structures", "edges", "parameters", "memory", "the run", "1,000 steps"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.extxyz"]
    main(f"pretrain {tmp_path}/a.extxyz --objective Potential {model} --dry-run".split())  # a folder is not needed
    assert "1,000 steps" in capsys.readouterr().err


def test_a_dry_run_bounded_by_time_says_how_many_steps_fit() -> None:
    model = tm.pretrain(alloys(8), tm.Potential(), painn(), dry_run=True, time="2min", **QUICK)
    assert 1 < model.card["dry run"]["steps"] < 10**6
    assert model.card["dry run"]["minutes"] == pytest.approx(2, rel=0.2)


def test_a_dry_run_of_fine_tuning_tells_what_is_trained() -> None:
    model = tm.finetune(potential(), alloys(8), tm.Potential(), dry_run=True, backbone_lr=0.0, **QUICK)
    cost = model.card["dry run"]
    assert cost["trained_parameters"] < cost["parameters"]
    assert same_bits(weights_of(model, "backbone."), weights_of(potential(), "backbone."))


# --------------------------------------------------------------------------------------------------------- start-up


def test_only_what_is_needed_is_imported() -> None:
    heavy = ("jsonargparse", "matplotlib", "pyarrow", "scipy", "yaml", "torch._dynamo", "ase.io", "ase.db")
    code = f"import sys, transfermium; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


def test_importing_loads_little_besides_torch() -> None:
    """Counted rather than timed: a busy machine is slow at random."""
    code = """
import sys
import torch
torchs = set(sys.modules)
import transfermium
new = {name.split(".")[0] for name in set(sys.modules) - torchs}
others = [name for name in set(sys.modules) - torchs if name.split(".")[0] != "transfermium"]
print(len(others), *sorted(name for name in new if name not in sys.stdlib_module_names))
"""
    number, *packages = run(code).split()
    own = {name for name in packages if not name.startswith(("_", "cython"))}
    assert own <= {"ase", "numpy", "rich", "safetensors", "transfermium", "vesin"}
    assert int(number) < 130  # 110 beside our own, and torch has 1,100


def test_the_first_steps_import_no_compiler() -> None:
    code = """
import sys
import transfermium as tm
from tests.alloys import QUICK, alloys, painn
tm.pretrain(alloys(4), tm.Potential(), painn(), steps=2, **QUICK)
print("torch._dynamo" in sys.modules)
"""
    assert run(code) == "False"


# ---------------------------------------------------------------------------------------------------------- helpers


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def counted_searches(monkeypatch: pytest.MonkeyPatch) -> list[Atoms]:
    searched: list[Atoms] = []
    search = Cutoff.neighbors

    def counting(self: Cutoff, atoms: Atoms, *kept: Any) -> Neighbors:
        searched.append(atoms)
        return search(self, atoms, *kept)

    monkeypatch.setattr(Cutoff, "neighbors", counting)
    return searched


def memory_for(monkeypatch: pytest.MonkeyPatch, n_edges: int) -> list[int]:
    """Make losses of more than so many edges fail for want of memory; the list fills with the sizes of the others."""
    sizes: list[int] = []
    loss = tm.Potential.loss

    def failing(self: tm.Potential, outputs: Any, batch: Batch) -> Any:
        if batch.graph.n_edges > n_edges:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        sizes.append(batch.graph.n_edges)
        return loss(self, outputs, batch)

    monkeypatch.setattr(tm.Potential, "loss", failing)
    return sizes


def trained(
    structures: Any = None, dtype: Any = "float64", steps: int = 4, out: Path | None = None, until: int | None = None
) -> dict[str, torch.Tensor]:
    """Weights after some steps of batches of up to 400 edges; `until` leaves the loop earlier."""
    structures = ready(alloys(8)) if structures is None else structures
    objective = tm.Potential(energy=1.0, forces=1.0, stress=1.0)
    torch.manual_seed(0)
    model = Model(painn(), objective.outputs(8))
    config = TrainConfig(steps=steps, edges=400, device="cpu", dtype=dtype)
    for progress in train(model, objective, structures, config, out=out, save_every=0.0):
        if progress.step == until:
            break
    return weights_of(model)


def interrupting(function: Any, after: int) -> Any:
    """The same function, interrupted from the keyboard after so many calls."""
    calls = iter(range(after))

    def call(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def identical(a: Batch, b: Batch) -> bool:
    pairs = [*zip(a.graph[:-1], b.graph[:-1], strict=True), *((a.targets[n], b.targets[n]) for n in a.targets)]
    return all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) and x.dtype == y.dtype for x, y in pairs)
