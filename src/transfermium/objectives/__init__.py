"""What a model can be asked to learn, one objective per file."""

from .base import Objective, Quantity
from .denoise import Denoise
from .fidelity import Fidelities
from .mask import MaskAtoms, MaskElements
from .positions import MaskPositions
from .potential import Potential
from .property import Property
from .together import Together

__all__ = [
    "Denoise",
    "Fidelities",
    "MaskAtoms",
    "MaskElements",
    "MaskPositions",
    "Objective",
    "Potential",
    "Property",
    "Quantity",
    "Together",
]
