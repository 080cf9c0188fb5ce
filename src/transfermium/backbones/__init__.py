"""Architectures, one per file."""

from .base import Backbone, Features
from .cgat import CGAT
from .cgcnn import CGCNN
from .egnn import EGNN
from .et import ET
from .forcenet import ForceNet
from .gns import GNS
from .painn import PaiNN
from .tensornet import TensorNet

__all__ = ["CGAT", "CGCNN", "EGNN", "ET", "GNS", "Backbone", "Features", "ForceNet", "PaiNN", "TensorNet"]
