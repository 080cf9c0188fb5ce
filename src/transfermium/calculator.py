"""Any model as an ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from .console import and_
from .errors import InputError
from .evaluate import unseen_elements, without_reference
from .graph import to_graph
from .model import Model, load
from .train import chosen_device
from .uncertainty import Uncertainty, why_not


class Calculator(AseCalculator):
    """Energy (eV), forces (eV/Å) and stress (eV/Å³) of a model, for molecular dynamics and relaxations in ASE.

    Args:
        model: a model or its file.
        device: "auto" is CUDA where there is one, else the CPU.
        allow_unseen: predict on elements that the model never saw in training, and energies with elements that no
            label of its last stage had, instead of refusing; forces and stress of the latter are never refused.
        skin: how many Å further than the cutoff neighbours are searched, so that none are searched again until an atom
            has moved by half of it or the cell has changed; results do not depend on it, and zero searches every time.
        part: which part of a model that learned several objectives, each with its own energy.
        interval: with this probability, such as 0.9, labels would lie within what `results` then has too:
            "energy_low90" and "energy_high90" (eV), "forces_error90" (eV/Å), "stress_error90" (eV/Å³),
            "training_distance" and "far", as of `predict`. It costs one more pass of the backbone, without derivatives.

    Raises:
        InputError: when the model has no energy, is asked about elements it never saw, or for the energy of elements
            whose reference no label determined.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012  (ASE declares a list)

    def __init__(
        self,
        model: str | Path | Model,
        device: str = "auto",
        allow_unseen: bool = False,
        skin: float = 1.0,
        part: str | None = None,
        interval: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        model = (model if isinstance(model, Model) else load(model)).whole(part)
        self.model = model.to(chosen_device(device)).eval()
        meaning = self.model.card.get("quantities", {}).get("energy", ["energy", "eV"])
        if "energy" not in self.model.outputs or meaning[0] != "energy":
            raise InputError(
                "this model predicts no energy: train it with the Potential objective, with an energy, to use it in "
                "ASE or torch-sim"
            )
        if not 0 <= skin < 10:
            raise InputError(f"skin is {skin} Å, but must be zero or a little more: 1.0 is usual")
        self.allow_unseen = allow_unseen
        self.skin = skin
        self.interval = interval
        self.doubt = None if interval is None else Uncertainty.of(self.model)
        if interval is not None and self.doubt is None:
            raise InputError(f"this model has no intervals: {why_not(self.model)}")
        self.edges = self.model.backbone.edges
        self.search = self.edges.search(skin)
        self.checked: set[int] = set()
        self.usual = {"forces"} & set(self.model.outputs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "search"}  # it is of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.search = self.edges.search(self.skin)

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        self.check_elements(self.atoms.numbers)
        wanted = {"energy", *({"free_energy": "energy"}.get(p, p) for p in properties)}
        lacking = self.lacking(self.atoms.numbers)
        if {"energy", "free_energy"} & set(properties):
            self.check_zero(self.atoms.numbers)
        for name in wanted - set(self.model.outputs):
            raise PropertyNotImplementedError(f"this model has no {name}")
        periodic = self.atoms.pbc.all() and self.atoms.cell.rank == 3
        if "stress" in wanted and not periodic:
            raise PropertyNotImplementedError("stress needs a structure that is periodic in three directions")

        if len(wanted) > 1:  # derivatives cost little together, and what was asked for once is so again
            self.usual |= wanted
            wanted |= self.usual - (set() if periodic else {"stress"})
        neighbors = self.edges.neighbors(self.atoms, self.search)
        graph = to_graph([self.atoms], self.edges, known=[neighbors])
        outputs = self.model(graph, wanted)
        arrays = {name: value.detach().double().cpu().numpy() for name, value in outputs.items()}
        if not lacking:
            self.results["energy"] = self.results["free_energy"] = float(arrays["energy"][0])
        if "forces" in arrays:
            self.results["forces"] = arrays["forces"]
        if "stress" in arrays:
            self.results["stress"] = full_3x3_to_voigt_6_stress(arrays["stress"][0])
        if self.doubt is not None and self.interval is not None:
            known = {name: value for name, value in arrays.items() if name != "energy" or not lacking}
            cut = {name: [value if self.model.per_atom(name) else value[0]] for name, value in known.items()}
            for name, value in self.doubt.bounds(self.model, graph, cut, self.interval).items():
                self.results[name] = value[0].item()

    def check_elements(self, numbers: np.ndarray) -> None:
        """Refuse atomic numbers that the model never saw."""
        new = set(numbers.tolist()) - self.checked
        if new and not self.allow_unseen:
            unseen = unseen_elements(self.model, numbers)
            if unseen:
                raise InputError(
                    f"the model never saw {', '.join(unseen)}: train on structures with these elements, "
                    "or pass allow_unseen=True (--allow-unseen)"
                )
        self.checked |= new

    def check_zero(self, numbers: np.ndarray) -> None:
        """Refuse atomic numbers for which an energy has no known zero."""
        if lacking := self.lacking(numbers):
            raise InputError(
                f"no label that this model learned from has {and_(lacking)}, so this energy has no known zero: "
                "fine-tune on such labels or with unseen='isolated', 'group' or 'keep', or pass allow_unseen=True "
                "where differences at one composition are all that counts, as in relaxations"
            )

    def lacking(self, numbers: np.ndarray) -> list[str]:
        """Symbols of the elements for which an energy has no known zero, where that matters."""
        return [] if self.allow_unseen else without_reference(self.model, numbers)
