"""MACE: 64 channels, max_L 1, correlation 3; its own neighbour list and calculator."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from torch import Tensor

from peers import Setting

torch.serialization.add_safe_globals([slice])  # for the constants that e3nn 0.4.4 ships

from e3nn import o3  # noqa: E402
from mace import data, modules  # noqa: E402
from mace.calculators import MACECalculator  # noqa: E402
from mace.tools import AtomicNumberTable, torch_geometric  # noqa: E402


class Peer:
    def __init__(self, setting: Setting):
        torch.set_default_dtype(torch.float32)
        width = setting.width
        self.model = modules.ScaleShiftMACE(
            r_max=setting.cutoff,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
            num_interactions=setting.layers,
            num_elements=len(setting.elements),
            hidden_irreps=o3.Irreps(f"{width}x0e+{width}x1o"),
            MLP_irreps=o3.Irreps("16x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.zeros(len(setting.elements)),
            avg_num_neighbors=setting.neighbors,
            atomic_numbers=setting.elements,
            correlation=3,
            radial_MLP=[width, width, width],
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
        self.table = AtomicNumberTable(setting.elements)
        self.cutoff = setting.cutoff
        self.outputs = setting.outputs

    def prepare(self, atoms: Atoms) -> Any:
        configuration = data.config_from_atoms(atoms)
        return data.AtomicData.from_config(configuration, z_table=self.table, cutoff=self.cutoff)

    def collate(self, graphs: Sequence[Any]) -> dict[str, Tensor]:
        return torch_geometric.batch.Batch.from_data_list(list(graphs)).to_dict()

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.model(
            batch,
            training=self.model.training,
            compute_force="forces" in self.outputs,
            compute_stress="stress" in self.outputs,
        )
        return {name: found[name] for name in self.outputs}

    def calculator(self) -> Calculator:
        return MACECalculator(models=self.model, device="cpu", default_dtype="float32")
