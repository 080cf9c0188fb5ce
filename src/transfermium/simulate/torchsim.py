"""Models in torch-sim, which moves many structures at once (arXiv:2508.06628); needs the extra `torch-sim`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from ..calculator import Calculator
from ..errors import InputError
from ..graph import Neighbors, to_graph
from ..model import Model
from .dynamics import STRETCHED, check_forces, ended, is_periodic

try:
    import torch_sim
    from torch_sim.models.interface import ModelInterface
except ImportError:
    raise InputError("torch-sim is not installed: pip install 'transfermium[torch-sim]'") from None

FIRST_STEP = 0.2  # twice ASE's: torch-sim halves it at once, since atoms at rest do not move along their forces
NOBODY = Neighbors(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int32))


class TorchSim(ModelInterface):
    """Energies (eV), forces (eV/Å) and stresses (eV/Å³, negative when compressed) of a model, for torch-sim.

    Neighbours are found as everywhere here, on the CPU; stresses of structures that are not periodic are NaN.

    Args:
        model: a model or its file.
        device: "auto" is CUDA where there is one, else the CPU.
        allow_unseen: predict on elements that the model never saw, as in `Calculator`.
        part: which part of a model that learned several objectives, each with its own energy.
        dtype: of states and results; the model computes in its own.

    Raises:
        InputError: when the model has no energy or no forces, or is asked about elements that it never saw.
    """

    def __init__(
        self,
        model: str | Path | Model,
        device: str = "auto",
        allow_unseen: bool = False,
        part: str | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        self.calculator = Calculator(model, device, allow_unseen, part=part)
        self.model = self.calculator.model
        check_forces(self.model, "move atoms")
        self.edges = self.model.backbone.edges
        self.wanted = [name for name in ("energy", "forces", "stress") if name in self.model.outputs]
        self.outputs: dict[str, Tensor] = {}  # of the last call
        self.patient = False
        self.trouble: dict[int, str] = {}
        self._device = next(self.model.parameters()).device
        self._dtype = dtype
        self._compute_forces = True
        self._compute_stress = "stress" in self.wanted

    def forward(self, state: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Energy (n_systems,), forces (n_atoms, 3) and, of a model that has it, stress (n_systems, 3, 3)."""
        state = state if isinstance(state, torch_sim.SimState) else torch_sim.SimState(**state)
        structures = structures_of(state)
        numbers = np.concatenate([atoms.numbers for atoms in structures])
        self.calculator.check_elements(numbers)
        self.calculator.check_zero(numbers)
        graph = to_graph(structures, self.edges, known=self.neighbors(structures))
        outputs = {name: value.detach().to(self._dtype) for name, value in self.model(graph, self.wanted).items()}
        for system in self.trouble:
            outputs["energy"][system] = torch.nan
            outputs["forces"][state.system_idx == system] = torch.nan
        self.outputs = outputs
        return dict(outputs)

    def neighbors(self, structures: Sequence[ase.Atoms]) -> list[Neighbors]:
        """Of each structure; when patient, one in which none can be searched is noted, and does not stop the others."""
        found, self.trouble = [], {}
        for system, atoms in enumerate(structures):
            try:
                found.append(self.edges.neighbors(atoms))
            except InputError as error:
                if not self.patient:
                    raise
                self.trouble[system] = str(error)
                found.append(NOBODY)
        return found


def structures_of(state: Any) -> list[ase.Atoms]:
    """The structures of a state, without what else it knows of them."""
    ends = np.cumsum(state.n_atoms_per_system.tolist())[:-1]
    positions, numbers = (np.split(x.double().cpu().numpy(), ends) for x in (state.positions, state.atomic_numbers))
    cells = state.row_vector_cell.double().cpu().numpy()
    pbc = np.asarray(torch.as_tensor(state.pbc).cpu())
    return [
        ase.Atoms(numbers=z.astype(int), positions=x, cell=cell, pbc=pbc)
        for z, x, cell in zip(numbers, positions, cells, strict=True)
    ]


def relaxed_together(
    given: Sequence[ase.Atoms], first: int, model: TorchSim, fmax: float, cell: bool, steps: int, edges: int
) -> Iterator[ase.Atoms]:
    """Copies of the structures from `first` on at the minimum of the energy, in their order; `relax` describes them.

    As many are on their way at once as have `edges` edges; one that arrives makes room for the next. Periodic ones
    come first: torch-sim has no state of both kinds.
    """
    arrived: dict[int, ase.Atoms] = {}
    due = first
    for periodic in (True, False):
        members = [index for index in range(first, len(given)) if is_periodic(given[index]) == periodic]
        for index, atoms in _relaxations(given, members, _Company(model, fmax, cell, steps), edges):
            arrived[index] = atoms
            while due in arrived:
                yield arrived.pop(due)
                due += 1


def check_structures(structures: Sequence[ase.Atoms], cell: bool) -> None:
    """Refuse what torch-sim would move in another way than asked."""
    for index in range(len(structures)):
        atoms = structures[index]
        if atoms.constraints:
            raise InputError(f"structure {index} has constraints, which torch-sim does not keep: choose the engine ase")
        if atoms.pbc.any() and not is_periodic(atoms):
            raise InputError(
                f"structure {index} is not periodic in all directions or none, as torch-sim wants: choose the "
                "engine ase"
            )
        if cell and np.linalg.det(atoms.cell.array) < 0:
            raise InputError(
                f"structure {index} has left-handed cell vectors, which torch-sim would relax the wrong way: swap "
                "two of them, or choose the engine ase"
            )


class _Underway:
    """One structure on its way to rest."""

    def __init__(self, index: int, given: ase.Atoms):
        self.index = index
        self.given = given
        self.step = -1
        self.trouble: str | None = None
        self.converged = False
        self.first: float | None = None  # energy
        self.results: dict[str, Any] = {}

    def note(self, atoms: ase.Atoms, results: dict[str, Any], trouble: str | None) -> None:
        """It is here now; where something is wrong, it is left as it was before."""
        self.step += 1
        stretch = atoms.get_volume() / self.given.get_volume() if is_periodic(atoms) else 1.0
        if trouble is None and not (np.isfinite(results["energy"]) and np.isfinite(results["forces"]).all()):
            trouble = "its forces or its energy are no finite numbers"
        elif trouble is None and not 1 / STRETCHED < stretch < STRETCHED:
            trouble = f"its volume became {stretch:.3g} times what it was"
        self.trouble = trouble
        if self.step == 0 or trouble is None:
            self.atoms = atoms
        if trouble is None:
            self.first = results["energy"] if self.first is None else self.first
            self.results = results

    def ended(self) -> ase.Atoms:
        atoms = self.given.copy()
        atoms.set_cell(self.atoms.cell)
        atoms.set_positions(self.atoms.positions)
        return ended(atoms, self.converged, self.step, self.first, self.results, self.trouble)


class _Company:
    """Structures on their way at once, by the FIRE of torch-sim; each goes as it would alone."""

    def __init__(self, model: TorchSim, fmax: float, cell: bool, steps: int):
        self.model = model
        self.model.patient = True
        self.fmax = fmax
        self.cell = cell
        self.steps = steps
        self.begin, self.go_on = _fire(model, cell)
        self.state: Any = None
        self.underway: list[_Underway] = []

    def join(self, fresh: list[_Underway]) -> list[_Underway]:
        """Take these in; returns those that are at rest already."""
        state = torch_sim.io.atoms_to_state([one.given for one in fresh], self.model.device, self.model.dtype)
        state = self.begin(state)
        state.velocities = torch.zeros_like(state.velocities)  # torch-sim marks beginners, and lets all others wait
        if self.cell:
            state.cell_velocities = torch.zeros_like(state.cell_velocities)
        state, going = self._noted(state, fresh)
        if going:
            self.state = torch_sim.concatenate_states([self.state, state]) if self.underway else state
            self.underway = self.underway + going
        return [one for one in fresh if one not in going]

    def step(self) -> list[_Underway]:
        """Move all by one step; returns those that have come to an end."""
        were = self.underway
        self.state, self.underway = self._noted(self.go_on(self.state), were)
        return [one for one in were if one not in self.underway]

    def _noted(self, state: Any, members: list[_Underway]) -> tuple[Any, list[_Underway]]:
        """The state and the list of those that go on."""
        structures = structures_of(state)
        results = _by_structure(self.model.outputs, structures)
        pulls = state.cell_forces.norm(dim=2).amax(dim=1).tolist() if self.cell else [0.0] * len(members)
        going = []
        for k, (one, atoms, found, pull) in enumerate(zip(members, structures, results, pulls, strict=True)):
            one.note(atoms, found, self.model.trouble.get(k))
            largest = max(np.linalg.norm(found["forces"], axis=1).max(), pull)
            one.converged = one.trouble is None and bool(largest < self.fmax)
            if not (one.converged or one.trouble or one.step == self.steps):
                going.append(k)
        return state[going] if 0 < len(going) < len(members) else state, [members[k] for k in going]


def _relaxations(
    given: Sequence[ase.Atoms], members: Sequence[int], company: _Company, most: int
) -> Iterator[tuple[int, ase.Atoms]]:
    """Structures of one kind, with their places, in the order in which they come to an end."""
    waiting = deque((index, len(company.model.neighbors([given[index]])[0].senders)) for index in members)
    edges: dict[int, int] = {}  # of those on their way
    while waiting or edges:
        fresh = []
        while waiting and (not edges or sum(edges.values()) + waiting[0][1] <= most):
            index, edges[index] = waiting.popleft()
            fresh.append(_Underway(index, given[index]))
        ended = company.join(fresh) if fresh else []
        if company.underway:
            ended += company.step()
        for one in ended:
            del edges[one.index]
            yield one.index, one.ended()


def _fire(model: TorchSim, cell: bool) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """What makes a state for FIRE as in ASE, and what moves it by a step."""
    if hasattr(torch_sim, "fire_init"):
        filter = torch_sim.CellFilter.frechet if cell else None
        begin = partial(torch_sim.fire_init, model=model, dt_start=FIRST_STEP, cell_filter=filter)
        return begin, partial(torch_sim.fire_step, model=model)
    old = torch_sim.optimizers  # of 0.3, the last for Python 3.11
    begin, go_on = (old.frechet_cell_fire if cell else old.fire)(model, dt_start=FIRST_STEP)
    return begin, go_on


def _by_structure(outputs: dict[str, Tensor], structures: Sequence[ase.Atoms]) -> list[dict[str, Any]]:
    """Results of each, as ASE has them."""
    arrays = {name: value.double().cpu().numpy() for name, value in outputs.items()}
    forces = np.split(arrays["forces"], np.cumsum([len(atoms) for atoms in structures])[:-1])
    found: list[dict[str, Any]] = []
    for k, atoms in enumerate(structures):
        found.append({"energy": float(arrays["energy"][k]), "forces": forces[k]})
        if "stress" in arrays and is_periodic(atoms):
            found[k]["stress"] = full_3x3_to_voigt_6_stress(arrays["stress"][k])
    return found
