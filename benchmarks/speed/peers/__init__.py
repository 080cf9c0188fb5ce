"""One short file per package; each has a class `Peer` that keeps this protocol."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ase import Atoms
from ase.calculators.calculator import Calculator
from torch import Tensor, nn


class Setting(NamedTuple):
    """What a peer builds its untrained float32 model from."""

    backbone: str
    width: int
    layers: int
    cutoff: float  # Å
    elements: list[int]  # atomic numbers
    neighbors: float  # mean number per atom
    outputs: tuple[str, ...]  # "energy", with "forces", with "stress"; more than that is not computed
    compiled: bool


class Peer(Protocol):
    """A package, built and called as its own training does it."""

    model: nn.Module  # derivatives can be differentiated again in training mode, as `model.train(mode)` sets it

    def __init__(self, setting: Setting): ...

    def prepare(self, atoms: Atoms) -> Any:
        """The package's own graph of one structure, neighbours included."""

    def collate(self, graphs: Sequence[Any]) -> Any:
        """Graphs side by side, as the model takes them."""

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """The outputs that were asked for, in eV and Å: (n_systems,), (n_atoms, 3), (n_systems, 3, 3).

        A stress that the package does not have is left out.
        """

    def calculator(self) -> Calculator:
        """The package's own ASE calculator around the model."""
