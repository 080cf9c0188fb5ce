"""Sums over neighbours: formulas, written once, with fast first and second derivatives."""

from .expression import head_total, sigmoid, softplus, sqrt, total
from .formula import AtomFormula, EdgeFormula, Neighborhood, Radii, fixed_weights, have_kernels, reference

__all__ = [
    "AtomFormula",
    "EdgeFormula",
    "Neighborhood",
    "Radii",
    "fixed_weights",
    "have_kernels",
    "head_total",
    "reference",
    "sigmoid",
    "softplus",
    "sqrt",
    "total",
]
