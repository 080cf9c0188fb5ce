"""SchNetPack: PaiNN or SchNet, 20 Gaussians, its fastest neighbour list (matscipy)."""

import os
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.data.dataloader
from ase import Atoms
from ase.calculators.calculator import Calculator
from torch import Tensor

from peers import Setting

if not hasattr(torch.utils.data.dataloader, "T_co"):  # which it imports, and recent versions of torch have not
    torch.utils.data.dataloader.T_co = typing.TypeVar("T_co", covariant=True)  # type: ignore[attr-defined]

import schnetpack
from schnetpack.data.loader import _atoms_collate_fn
from schnetpack.interfaces import AtomsConverter, SpkCalculator
from schnetpack.transform import MatScipyNeighborList


class Peer:
    def __init__(self, setting: Setting):
        stress = "stress" in setting.outputs
        representation = getattr(schnetpack.representation, setting.backbone)(
            n_atom_basis=setting.width,
            n_interactions=setting.layers,
            radial_basis=schnetpack.nn.GaussianRBF(n_rbf=20, cutoff=setting.cutoff),
            cutoff_fn=schnetpack.nn.CosineCutoff(setting.cutoff),
        )
        inputs = [schnetpack.atomistic.Strain()] if stress else []
        outputs = [schnetpack.atomistic.Atomwise(n_in=setting.width, output_key="energy")]
        if "forces" in setting.outputs:
            outputs.append(schnetpack.atomistic.Forces(calc_stress=stress))
        self.model = schnetpack.model.NeuralNetworkPotential(
            representation=representation,
            input_modules=[*inputs, schnetpack.atomistic.PairwiseDistances()],
            output_modules=outputs,
        )
        self.cutoff = setting.cutoff
        self.convert = AtomsConverter(neighbor_list=MatScipyNeighborList(setting.cutoff))

    def prepare(self, atoms: Atoms) -> dict[str, Tensor]:
        return self.convert(atoms)

    def collate(self, graphs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        made_by_collate = ("_idx_m", "_idx_i_local", "_idx_j_local")
        return _atoms_collate_fn([{k: v for k, v in graph.items() if k not in made_by_collate} for graph in graphs])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.model(dict(batch))

    def calculator(self) -> Calculator:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # it unpickles a whole model: the one saved here
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            torch.save(self.model, path)
            return SpkCalculator(str(path), MatScipyNeighborList(self.cutoff), energy_unit="eV", dtype=torch.float32)
