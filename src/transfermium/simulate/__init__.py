"""Models moving atoms: molecular dynamics and relaxations, one structure at a time or many at once."""

from .md import md
from .relax import relax

__all__ = ["md", "relax"]
