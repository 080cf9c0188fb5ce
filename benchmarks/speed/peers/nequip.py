"""NequIP: l_max 1 without odd scalars; its own neighbour list, its own compilation in training.

Its model derives forces and stress together or neither.
"""

from collections.abc import Sequence

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import chemical_symbols
from nequip.data import AtomicDataDict, from_ase
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
from nequip.integrations.ase import NequIPCalculator
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state
from torch import Tensor

from peers import Setting

LABELS = ("forces", "stress", "virial", "total_energy")


class Peer:
    def __init__(self, setting: Setting):
        set_global_state()
        symbols = [chemical_symbols[z] for z in setting.elements]
        self.model = NequIPGNNModel(
            seed=0,
            model_dtype="float32",
            type_names=symbols,
            r_max=setting.cutoff,
            num_layers=setting.layers,
            num_features=setting.width,
            radial_mlp_width=setting.width,
            l_max=1,
            parity=False,
            avg_num_neighbors=setting.neighbors,
            do_derivatives="forces" in setting.outputs,
            compile_mode="compile" if setting.compiled else "eager",
        )
        self.outputs = setting.outputs
        self.transforms = [
            ChemicalSpeciesToAtomTypeMapper(model_type_names=symbols),
            NeighborListTransform(r_max=setting.cutoff),
        ]

    def prepare(self, atoms: Atoms) -> dict[str, Tensor]:
        graph = from_ase(atoms, include_keys=[])
        for transform in self.transforms:
            graph = transform(graph)
        return graph

    def collate(self, graphs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        joined = AtomicDataDict.batched_from_list(list(graphs))
        real = {k: v.float() if torch.is_floating_point(v) else v for k, v in joined.items() if torch.is_tensor(v)}
        return {name: value for name, value in real.items() if name not in LABELS}

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.model(dict(batch))
        named = {"energy": "total_energy", "forces": "forces", "stress": "stress"}
        return {name: found[named[name]] for name in self.outputs}

    def calculator(self) -> Calculator:
        return NequIPCalculator(self.model.eval(), device="cpu", transforms=self.transforms)
