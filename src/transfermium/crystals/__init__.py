"""Crystals at two levels of theory, computed for this package (see README.md in this folder)."""

from __future__ import annotations

from importlib.resources import as_file, files

from ase import Atoms

from ..data.read import read
from ..errors import InputError

LEVELS = ("PBE", "r2SCAN")


def crystals(level: str = "PBE", split: str | None = None) -> list[Atoms]:
    """Rattled and strained cells with energy and forces, and with stress at the PBE level.

    Args:
        level: "PBE" or "r2SCAN".
        split: "train" or "test" (materials that are in no training set, at neither level); all by default.
    """
    if level not in LEVELS or split not in ("train", "test", None):
        raise InputError(f"there are crystals at the levels {' and '.join(LEVELS)}, and the splits train and test")
    with as_file(files(__name__) / f"{level}.extxyz.xz") as path:
        return [atoms for atoms in read(path) if split in (None, atoms.info["split"])]
