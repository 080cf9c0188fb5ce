"""What is found once is used again, what is not needed is not loaded, and what does not fit is cut: same results."""

from __future__ import annotations

import subprocess
import sys
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
from transfermium.data.load import Batches, ahead, count_edges
from transfermium.graph import Batch, Cutoff, Neighbors
from transfermium.model import Model
from transfermium.train import TrainConfig

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
    assert sum(neighbors.bytes for neighbors in batches.kept.values()) < 3000


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
        if k == 30:
            del atoms[0]
        snapshots.append(atoms.copy())
    return snapshots


def results(calculator: tm.Calculator, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()


def edges(neighbors: Neighbors) -> list[tuple[Any, ...]]:
    assert np.all(np.diff(neighbors.receivers) >= 0)
    return sorted(zip(neighbors.receivers, neighbors.senders, map(tuple, neighbors.shifts), strict=True))


# --------------------------------------------------------------------------------------------------------- the loop


def test_on_a_cpu_batches_come_as_they_are() -> None:
    stream = iter([(0, EVERYONE, None), (1, EVERYONE, None)])
    assert len(list(ahead(stream, torch.device("cpu"), torch.float32))) == 2


def test_when_memory_runs_out_the_step_is_the_same_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained()
    sizes = memory_for(monkeypatch, n_edges=250)
    found = trained()

    assert max(sizes) <= 250
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)


def test_a_structure_that_memory_has_no_room_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_for(monkeypatch, n_edges=20)
    with pytest.raises(tm.InputError, match=r"memory has no room for a structure of \d+ edges"):
        trained()


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
    assert (cost["structures"], cost["validation_structures"], cost["steps"]) == (9, 3, 600)
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())
    assert cost["largest"] <= cost["edges"] <= 9 * cost["largest"]
    assert cost["memory"] > 10**7
    assert cost["minutes"] * 60 >= 600 * cost["step_seconds"] > 0


def test_a_dry_run_on_the_command_line_prints_and_writes_nothing(tmp_path: Any, capsys: Any) -> None:
    write(tmp_path / "a.extxyz", alloys(6))
    model = "--backbone PaiNN --backbone.width 8 --backbone.depth 1 --edges 400 --device cpu"
    main(f"pretrain {tmp_path}/a.extxyz --objective Potential {model} --out {tmp_path}/run --dry-run".split())
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("structures", "edges", "parameters", "memory", "the run", "1,000 steps"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.extxyz"]


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


def test_importing_takes_little_longer_than_importing_torch() -> None:
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    ours, torchs = (min(float(run(code.format(name))) for _ in range(3)) for name in ("transfermium", "torch"))
    assert ours < 1.6 * torchs  # 1.2 on a quiet machine


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


def trained() -> dict[str, torch.Tensor]:
    """Weights after some steps of batches of up to 400 edges."""
    structures = ready(alloys(8))
    objective = tm.Potential(energy=1.0, forces=1.0, stress=1.0)
    torch.manual_seed(0)
    model = Model(painn(), objective.outputs(8)).double()
    for _ in tm.train(model, objective, structures, TrainConfig(steps=4, edges=400, device="cpu")):
        pass
    return weights_of(model)


def identical(a: Batch, b: Batch) -> bool:
    pairs = [*zip(a.graph[:-1], b.graph[:-1], strict=True), *((a.targets[n], b.targets[n]) for n in a.targets)]
    return all(torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) and x.dtype == y.dtype for x, y in pairs)
