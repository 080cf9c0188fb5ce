"""Architectures, one per file."""

from .base import Backbone, Features
from .cgcnn import CGCNN
from .painn import PaiNN
from .tensornet import TensorNet

__all__ = ["CGCNN", "Backbone", "Features", "PaiNN", "TensorNet"]
