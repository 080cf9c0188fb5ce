"""Relaxations of many structures, one after the other or many at once, into a file that grows."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import ase
import numpy as np

from ..calculator import Calculator
from ..console import bar, console
from ..data.read import Source, read
from ..errors import InputError
from ..model import Model, write_whole
from ..run import fingerprint, hold, leaving_nothing
from ..transfer.learn import weights_fingerprint
from .dynamics import (
    STRETCHED,
    as_text,
    check_forces,
    check_unseen,
    ended,
    forces_are_derivatives,
    has_stress,
    held_atoms,
    is_periodic,
    told_of_constraints,
)

CLIMBED = 1e-3  # eV; less is rounding


@leaving_nothing
def relax(
    model: str | Path | Model,
    structures: Source,
    out: str | Path | None = None,
    *,
    fmax: float = 0.05,
    cell: bool = False,
    optimizer: Literal["FIRE", "LBFGS"] = "FIRE",
    steps: int = 500,
    engine: Literal["ase", "torch-sim"] = "ase",
    edges: int = 10_000,
    part: str | None = None,
    device: str = "auto",
    allow_unseen: bool = False,
    verbose: bool = True,
) -> list[ase.Atoms]:
    """Copies of the structures at the minimum of the energy, with energy, forces and stress of the model.

    `atoms.info` has "relaxed" (whether forces came below fmax), "relax_steps", "relax_energy_change" (eV), and
    "relax_trouble" of those that fell apart, which are left as they last were, or could not begin. What structures
    came with of another geometry is not kept: energies, forces and stress under any name, charges, magnetic moments,
    dipoles and momenta.

    Args:
        out: an extended XYZ file, which grows with every structure; the same command goes on. A file of the same name
            with .jsonl added to its name, beside it, says how far it came.
        fmax: in eV/Å, the largest force that is left.
        cell: whether the cell relaxes too, by ASE's `FrechetCellFilter`.
        optimizer: "FIRE" is robust; "LBFGS" takes fewer steps near a minimum, and may climb to a saddle far from one.
        engine: "ase" relaxes one structure after the other; "torch-sim", an extra, many at once, with FIRE.
        edges: of torch-sim, how many the structures that move at once have together: a GPU takes some 100,000.
        part: which part of a model that learned several objectives, each with its own energy.

    Raises:
        InputError: for a model without forces, elements that it never saw, cells that cannot be relaxed, structures
            that the engine cannot move, and for a file that holds something else.
    """
    if optimizer not in ("FIRE", "LBFGS"):
        raise InputError(f"there is no optimizer '{optimizer}': choose FIRE or LBFGS")
    if not (fmax > 0 and steps >= 0):
        raise InputError(f"fmax {fmax} eV/Å in {steps} steps cannot be reached: fmax is more than 0, steps not less")
    together = None if engine == "ase" else _batched(engine, optimizer, edges)
    calculator = Calculator(model, device, allow_unseen, part=part)
    given = read(structures)
    check_forces(calculator.model, "relax")
    check_unseen(calculator, given)
    if cell:
        _check_cells(calculator.model, given)
    if together:
        together.check_structures(given, cell)
    if verbose and not forces_are_derivatives(calculator.model):
        console.print("Forces of this model are no derivatives of its energy: minima are where these forces vanish.")
    asked: dict[str, Any] = {"fmax": fmax, "cell": cell, "optimizer": optimizer, "steps": steps}
    if together:
        asked["engine"] = engine
    identity = {"model": weights_fingerprint(calculator.model), "structures": fingerprint(given), **asked}
    identity |= held_atoms(given)
    if verbose and out is not None and (told := told_of_constraints(given)):
        console.print(f"[yellow]{told}[/yellow]")
    kept = None if out is None else _Relaxed(Path(out), identity)

    relaxed = [] if kept is None else kept.found()
    with bar(not verbose) as progress:
        task = progress.add_task("relaxing", total=len(given), completed=len(relaxed), note="")
        first = len(relaxed)
        if together:
            simulated = together.TorchSim(calculator.model, device, allow_unseen)
            results = together.relaxed_together(given, first, simulated, fmax, cell, steps, edges)
        else:
            rest = (given[index] for index in range(first, len(given)))
            results = (_relaxed(atoms, calculator, fmax, cell, optimizer, steps) for atoms in rest)
        for atoms in results:
            relaxed.append(atoms)
            if kept is not None:
                kept.append(atoms)
            progress.update(task, advance=1, note=atoms.get_chemical_formula())
    if verbose:
        console.print(relaxation_summary(relaxed, fmax), markup=False)
    return relaxed


def relaxation_summary(relaxed: Sequence[ase.Atoms], fmax: float) -> str:
    """How many came to rest, in one sentence."""
    fell = sum("relax_trouble" in atoms.info for atoms in relaxed)
    done = sum(bool(atoms.info["relaxed"]) for atoms in relaxed)
    texts = [f"{done} of {len(relaxed)} structures reached {fmax:g} eV/Å"]
    if slow := len(relaxed) - done - fell:
        texts.append(f"{slow} did not in the steps allowed")
    if fell:
        texts.append(f"{fell} fell apart")
    if higher := sum(atoms.info["relaxed"] and atoms.info["relax_energy_change"] > CLIMBED for atoms in relaxed):
        texts.append(f"{higher} ended with a higher energy, at a saddle: use FIRE")
    return "; ".join(texts)


def _relaxed(
    given: ase.Atoms, calculator: Calculator, fmax: float, cell: bool, optimizer: str, steps: int
) -> ase.Atoms:
    """A copy at rest, or as it last was."""
    import ase.optimize
    from ase.filters import FrechetCellFilter

    atoms = given.copy()
    atoms.calc = calculator
    wanted = ["energy", "forces", *(["stress"] if has_stress(atoms) else [])]
    volume = atoms.get_volume() if cell else 1.0
    engine = getattr(ase.optimize, optimizer)(FrechetCellFilter(atoms) if cell else atoms, logfile=None)
    good, first, results, trouble, converged = atoms.copy(), None, {}, None, False
    try:
        with warnings.catch_warnings():  # of scipy, at every step, for errors of rounding
            warnings.filterwarnings("ignore", "logm result may be inaccurate", RuntimeWarning)
            for rest in engine.irun(fmax=fmax, steps=steps):
                now = _results(atoms, wanted)
                if not np.isfinite(now["forces"]).all() or not np.isfinite(now["energy"]):
                    raise InputError("its forces or its energy are no finite numbers")
                if cell and not 1 / STRETCHED < atoms.get_volume() / volume < STRETCHED:
                    raise InputError(f"its volume became {atoms.get_volume() / volume:.3g} times what it was")
                good, results, converged = atoms.copy(), now, bool(rest)
                first = now["energy"] if first is None else first
    except InputError as error:
        trouble, converged = str(error), False
    return ended(good, converged, engine.nsteps, first, results, trouble)


def _results(atoms: ase.Atoms, wanted: Sequence[str]) -> dict[str, Any]:
    found = {name: np.copy(atoms.calc.get_property(name, atoms)) for name in wanted}
    return {**found, "energy": float(found["energy"])}


class _Relaxed:
    """A file of relaxed structures that grows, and a list beside it of how far it came."""

    def __init__(self, out: Path, identity: dict[str, Any]):
        self.out, self.list = out, out.with_name(f"{out.name}.jsonl")
        if out.suffix.lower() not in (".extxyz", ".xyz"):
            raise InputError(f"{out} ends in '{out.suffix}', but relaxed structures are written to .extxyz or .xyz")
        out.parent.mkdir(parents=True, exist_ok=True)
        hold(out)
        lines = self.list.read_text().splitlines(keepends=True) if self.list.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # the last may have been cut off
        if not lines:
            if out.exists():
                raise InputError(f"{out} exists and {self.list} does not say what it holds: choose another file")
            lines = [json.dumps(identity) + "\n"]
        try:
            ours = json.loads(lines[0]) == identity
            self.size = int(json.loads(lines[-1])["bytes"]) if ours and len(lines) > 1 else 0
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{self.list} is damaged: delete it and {out}, and give the command again") from None
        if not ours:
            raise InputError(f"{out} holds other relaxations, of other structures or settings: choose another file")
        if (out.stat().st_size if out.exists() else 0) < self.size:
            raise InputError(f"{out} is shorter than it was: delete {self.list} and it, and give the command again")
        write_whole(self.list, "".join(lines).encode())  # first, for it says whose the other file is
        out.touch()
        os.truncate(out, self.size)
        self.done = len(lines) - 1

    def found(self) -> list[ase.Atoms]:
        from ase.io import read as ase_read

        return list(ase_read(self.out, ":", format="extxyz")) if self.done else []

    def append(self, atoms: ase.Atoms) -> None:
        with self.out.open("a") as file:
            file.write(as_text(atoms))
            file.flush()
            os.fsync(file.fileno())
        told = {name: atoms.info[name] for name in atoms.info if name.startswith("relax")}
        row = {"formula": atoms.get_chemical_formula(), **told, "bytes": self.out.stat().st_size}
        with self.list.open("a") as file:
            file.write(json.dumps(row, default=float) + "\n")


def _batched(engine: str, optimizer: str, edges: int) -> ModuleType:
    """The module that relaxes many at once, where it can do what is asked."""
    if engine != "torch-sim":
        raise InputError(f"there is no engine '{engine}': choose ase or torch-sim")
    if optimizer != "FIRE":
        raise InputError(f"torch-sim relaxes with FIRE here, not with {optimizer}: choose FIRE, or the engine ase")
    if edges < 1:
        raise InputError(f"edges is {edges}, but at least one structure has to move: 10000 suits a CPU")
    from . import torchsim

    return torchsim


def _check_cells(model: Model, structures: Sequence[ase.Atoms]) -> None:
    if "stress" not in model.outputs:
        raise InputError(
            "this model has no stress to relax cells with: train it on stresses, or leave cells as they are"
        )
    for index in range(len(structures)):
        if not is_periodic(structures[index]):
            raise InputError(f"structure {index} is not periodic in three directions: relax it without its cell")
