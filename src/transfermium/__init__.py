"""Pre-train atomistic graph networks on cheap data, transfer them to few labels, and measure what it saved."""

__version__ = "0.1.0"

from .backbones import CGAT, CGCNN, EGNN, ET, GNS, Backbone, Features, ForceNet, PaiNN, TensorNet
from .calculator import Calculator
from .crystals import crystals
from .data import PackedSet, leaks, pack, read
from .doctor import doctor
from .errors import InputError
from .evaluate import evaluate, predict
from .features import features
from .heads import (
    AtomHead,
    ClassHead,
    CompositionHead,
    DeviationHead,
    EnergyHead,
    Head,
    ScalarHead,
    TensorHead,
    VectorHead,
)
from .model import Gradient, Model, Strain, load
from .objectives import (
    Denoise,
    Fidelities,
    MaskAtoms,
    MaskElements,
    MaskPositions,
    Objective,
    Potential,
    Property,
    Together,
)
from .simulate import md, relax
from .suggest import suggest
from .train import TrainConfig, train
from .transfer import finetune, pretrain
from .transfer.energy_probe import EnergyProbeHead
from .transfer.probe import ProbeHead
from .waters import water

__all__ = [
    "CGAT",
    "CGCNN",
    "EGNN",
    "ET",
    "GNS",
    "AtomHead",
    "Backbone",
    "Calculator",
    "ClassHead",
    "CompositionHead",
    "Denoise",
    "DeviationHead",
    "EnergyHead",
    "EnergyProbeHead",
    "Features",
    "Fidelities",
    "ForceNet",
    "Gradient",
    "Head",
    "InputError",
    "MaskAtoms",
    "MaskElements",
    "MaskPositions",
    "Model",
    "Objective",
    "PackedSet",
    "PaiNN",
    "Potential",
    "ProbeHead",
    "Property",
    "ScalarHead",
    "Strain",
    "TensorHead",
    "TensorNet",
    "Together",
    "TrainConfig",
    "VectorHead",
    "crystals",
    "doctor",
    "evaluate",
    "features",
    "finetune",
    "leaks",
    "load",
    "md",
    "pack",
    "predict",
    "pretrain",
    "read",
    "relax",
    "suggest",
    "train",
    "water",
]
