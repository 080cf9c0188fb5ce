"""Pre-train atomistic graph networks on cheap data, transfer them to few labels, and measure what it saved."""

__version__ = "0.1.0"

from .backbones import CGAT, CGCNN, ET, Backbone, Features, PaiNN, TensorNet
from .calculator import Calculator
from .crystals import crystals
from .data import PackedSet, leaks, pack, read
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
from .objectives import Denoise, Fidelities, Objective, Potential, Property, Together
from .probe import ProbeHead
from .train import TrainConfig, train
from .transfer import finetune, pretrain

__all__ = [
    "CGAT",
    "CGCNN",
    "ET",
    "AtomHead",
    "Backbone",
    "Calculator",
    "ClassHead",
    "CompositionHead",
    "Denoise",
    "DeviationHead",
    "EnergyHead",
    "Features",
    "Fidelities",
    "Gradient",
    "Head",
    "InputError",
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
    "evaluate",
    "features",
    "finetune",
    "leaks",
    "load",
    "pack",
    "predict",
    "pretrain",
    "read",
    "train",
]
