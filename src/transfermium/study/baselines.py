"""What a few labels give without any network: shifts and lines, through a cheap value where one is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import ase
import numpy as np
from ase.data import chemical_symbols

from ..data.columns import blocks, counts_of
from ..errors import InputError
from ..references import per_element

ALONE = ("mean", "per-element fit")  # laws of labels alone
AS_IT_IS = "base as it is"  # the cheap value, where a base says it


def baselines(
    labels: Sequence[float] | np.ndarray,
    compositions: np.ndarray,
    test_compositions: np.ndarray,
    cheap: Sequence[float] | np.ndarray | None = None,
    test_cheap: Sequence[float] | np.ndarray | None = None,
    kind: Literal["extensive", "intensive"] = "extensive",
) -> dict[str, np.ndarray]:
    """Predictions on test structures, by the name of the law that was fitted to the labels.

    With cheap values: "cheap value" as it is, "constant shift", "per-element shift" and "linear map" of it; without:
    "mean" and "per-element fit" of the label itself. Extensive quantities are fitted per atom, so that a constant is
    one per atom; of intensive ones an element counts by its fraction of the atoms. Every law is a least-squares fit.
    Where labels do not determine what each element shifts, or only just, the shifts are pulled towards each other, by
    as much as leave-one-out errors say; an element that no label has counts as an average one (see `unlabelled`).

    Args:
        labels: (n,), finite.
        compositions: atoms of each element in the labelled structures, (n, n_elements); see `compositions_of`.
        test_compositions: the same of the test structures, (n_test, n_elements).
        cheap: of the same quantity, in its unit: other labels, or what a model predicts, (n,).
        test_cheap: the same of the test structures, (n_test,).
        kind: "extensive" (a total energy) or "intensive" (a band gap).

    Returns:
        (n_test,) each.
    """
    if kind not in ("extensive", "intensive"):
        raise InputError(f"kind is '{kind}', but must be extensive or intensive")
    if (cheap is None) != (test_cheap is None):
        raise InputError("cheap values are needed for the labelled structures and for the test structures, or for none")
    known = ((cheap, compositions), (test_cheap, test_compositions))
    y, a, b = np.asarray(labels, float), np.asarray(compositions, float), np.asarray(test_compositions, float)
    x, x_test = (np.zeros(len(of)) if given is None else np.asarray(given, float) for given, of in known)
    _check("labels", y, a)
    _check("cheap values", x, a)
    _check("cheap values of test structures", x_test, b)
    if a.shape[1:] != b.shape[1:] or not len(y):
        raise InputError(f"compositions are {a.shape} and {b.shape}, but need a label at least and the same elements")

    atoms, test_atoms = a.sum(axis=1), b.sum(axis=1)
    per = (atoms, test_atoms) if kind == "extensive" else (np.ones(len(a)), np.ones(len(b)))
    y, x, x_test = y / per[0], x / per[0], x_test / per[1]
    a, b = a / atoms[:, None], b / test_atoms[:, None]

    shift = float((y - x).mean())
    elements = x_test + b @ _by_element(a, y - x)
    if cheap is None:
        found = {"mean": np.full(len(b), shift), "per-element fit": elements}
    else:
        slope = _slope(x, y)
        found = {
            "cheap value": x_test,
            "constant shift": x_test + shift,
            "per-element shift": elements,
            "linear map": y.mean() + slope * (x_test - x.mean()),
        }
    return {name: values * per[1] for name, values in found.items()}


def unlabelled(compositions: np.ndarray, test_compositions: np.ndarray) -> list[str]:
    """Symbols of the elements that test structures have and no labelled one; columns are atomic numbers."""
    new = np.any(test_compositions, axis=0) & ~np.any(compositions, axis=0)
    return [chemical_symbols[z] for z in np.flatnonzero(new)]


def compositions_of(structures: Sequence[ase.Atoms]) -> np.ndarray:
    """Atoms of each element, columns are atomic numbers: (n_structures, n_elements)."""
    return np.concatenate([counts_of(block) for block in blocks(structures)])


def _check(what: str, values: np.ndarray, compositions: np.ndarray) -> None:
    if compositions.ndim != 2 or values.shape != compositions.shape[:1]:
        raise InputError(f"{what} are of shape {values.shape} for compositions of shape {compositions.shape}")
    if not np.isfinite(values).all():
        raise InputError(
            f"{what} are not finite in {np.count_nonzero(~np.isfinite(values))} structures: leave them out"
        )
    if not compositions.any(axis=1).all():
        raise InputError("a structure has no atoms: leave it out")


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the line through the points; one, as of a shift, where all x are equal."""
    spread = x - x.mean()
    return float(spread @ y / (spread @ spread)) if np.ptp(x) > 1e-12 * np.abs(x).max() else 1.0


def _by_element(fractions: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values per element, whose means over atoms best explain y, (n_elements,); of missing elements the mean."""
    present = np.any(fractions, axis=0)
    values = np.full(fractions.shape[1], y.mean())
    values[present] = per_element(fractions[:, present], y, ruled_out=0.0)
    return values
