"""Liquid water of a force field, made for this package (see README.md in this folder)."""

from __future__ import annotations

from importlib.resources import as_file, files

from ase import Atoms

from ..data.read import read
from ..errors import InputError

KINDS = ("flexible", "rigid")
MOLECULES = (64, 258)


def water(kind: str = "flexible", molecules: int = 64) -> list[Atoms]:
    """Boxes of TIP3P at 300 K and 0.997 g/cm³, without labels, to pre-train on.

    Args:
        kind: "flexible" or "rigid" molecules.
        molecules: in each box, 64 or 258.
    """
    if kind not in KINDS or molecules not in MOLECULES:
        raise InputError(
            f"there is {' and '.join(KINDS)} water, in boxes of {' and '.join(map(str, MOLECULES))} molecules"
        )
    with as_file(files(__name__) / f"{kind}-{molecules}.extxyz.xz") as path:
        return list(read(path))
