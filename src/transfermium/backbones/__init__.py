"""Architectures, one per file."""

from .base import Backbone, Features
from .cgat import CGAT
from .cgcnn import CGCNN
from .et import ET
from .painn import PaiNN
from .tensornet import TensorNet

__all__ = ["CGAT", "CGCNN", "ET", "Backbone", "Features", "PaiNN", "TensorNet"]
